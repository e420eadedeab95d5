"""Run a detector over image files, videos and cameras, and write what it finds."""

import glob
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from tqdm import tqdm

from ..data import open_image, read_picture
from ..data.formats import write_dataset
from ..data.reading import IMAGE_SUFFIXES
from ..drawing.detections import (
    DetectionFile,
    class_metadata,
    draw_detections,
    picture_name,
    save_picture,
    unused_path,
)
from ..drawing.video import Video, VideoFile
from ..errors import UserError
from ..inference import Detector

RESULT = "detections.json"


def find_inputs(texts: Sequence[str]) -> list[str]:
    """List the files that paths and patterns name, each once.

    A folder stands for its images; a warning tells if it has other files.

    Raises:
        UserError: there is no such file, or no image in a folder.
    """
    files = []
    for text in texts:
        if os.path.isfile(text):
            files.append(text)
        elif os.path.isdir(text):
            inside = sorted(filter(os.path.isfile, glob.glob(os.path.join(glob.escape(text), "*"))))
            images = [path for path in inside if has_image_name(path)]
            if not images:
                raise UserError(f"no images in {text}, judging by the file names")
            if others := len(inside) - len(images):
                warn(f"{text}: {count(others, 'other file')} omitted; name videos one by one")
            files += images
        else:
            found = sorted(filter(os.path.isfile, glob.glob(text, recursive=True)))
            if not found:
                hint = ": overrides come after --output FOLDER" if "=" in text else ""
                raise UserError(f"no file {text}{hint}")
            files += found
    return list(dict.fromkeys(files))


def has_image_name(path: str) -> bool:
    """Return whether the name is that of an image, and not hidden."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def is_image(path: str) -> bool:
    """Return whether a file is an image, by its name or else by its content."""
    if has_image_name(path):
        return True
    try:
        with open_image(path):
            return True
    except Exception:  # Pillow's readers raise errors of many kinds
        return False


def warn(text: object):
    """Print a warning beside the progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def count(number: int, noun: str) -> str:
    """Return a number and its noun, such as 2 images."""
    return f"{number} {noun}{'s' * (number != 1)}"


def tracker_class() -> Callable:
    """ByteTrack's tracker of one video. Raises UserError if it is not installed."""
    try:
        from trackers import ByteTrackTracker
    except ImportError as error:
        raise UserError(
            f"--track needs {error.name}: pip install -e '.[track]', then\n"
            "pip install --no-deps 'trackers>=2.6.1,<3'"
        ) from error
    return ByteTrackTracker


def add_track_ids(found: Instances, tracker: Any, seconds: float):
    """Give a frame's detections ``track_ids`` (K,), integers; -1 for what is new in this frame.

    Args:
        found: changed in place.
        tracker: has seen the earlier frames of the video.
        seconds: time of the frame since the video began.
    """
    from supervision import Detections

    given = Detections.from_detectron2({"instances": found})
    given.data["place"] = np.arange(len(found))
    tracked = tracker.update(given, timestamp=seconds)
    found.track_ids = torch.full((len(found),), -1)
    if len(found):
        found.track_ids[tracked.data["place"]] = torch.from_numpy(tracked.tracker_id)


class FileDetection:
    """Detects in one input after the other, and counts.

    Args:
        detector: the model.
        threshold: least score of detections that are drawn and written.
        output: the folder to write to.
        info: for the JSON file.
        form: "coco", or a format in which to write the detections in images besides, see
            `write_dataset`.
        track: give objects in videos and of cameras ids that they keep from frame to frame.

    Raises:
        UserError: what tracking needs is not installed.
    """

    def __init__(
        self,
        detector: Detector,
        threshold: float,
        output: Path,
        info: dict,
        form: str = "coco",
        *,
        track: bool = False,
    ):
        self.detector, self.threshold = detector, threshold
        self.tracker = tracker_class() if track else None
        self.output, self.form = output, form
        self.metadata = class_metadata(detector.class_names)
        self.detections = DetectionFile(detector.categories, info)
        self.num_unreadable = 0

    def run(self, inputs: Sequence[str | Video]):
        """Detect in files and cameras. An unreadable file among several gets a warning.

        The detections made so far are written even if an error or Ctrl-C ends the run.

        Raises:
            UserError: no input can be read, or a video cannot be written.
            OSError: a picture or a video cannot be written.
        """
        try:
            for source in tqdm(inputs, "inputs", disable=len(inputs) == 1 or None):
                try:
                    opened = self.open(source)
                except UserError as error:
                    if len(inputs) == 1:
                        raise
                    warn(error)
                    self.num_unreadable += 1
                    continue
                if isinstance(opened, Video):
                    self.detect_in_video(opened)
                else:
                    self.detect_in_image(source, opened)
        finally:
            if self.detections.images:
                self.detections.write(self.output / RESULT)
                if self.form != "coco":
                    write_dataset(self.detections.content, self.form, self.output)
        if self.num_unreadable == len(inputs):
            raise UserError("none of the inputs can be read")

    def open(self, source: str | Video) -> np.ndarray | Video:
        """Open an input; an image is (H, W, 3), BGR, uint8. Raises UserError if unreadable."""
        if isinstance(source, str) and is_image(source):
            return read_picture(source, "BGR")
        opened = Video(source) if isinstance(source, str) else source
        if self.form != "coco":
            raise UserError(f"{opened.name} is a video, and --format {self.form} needs images")
        return opened

    def detect_in_image(self, path: str, image: np.ndarray):
        """Write the picture of an image (H, W, 3), BGR, uint8."""
        found = self.detector(image, threshold=self.threshold)
        picture = draw_detections(image[:, :, ::-1], found, self.metadata)
        save_picture(picture, unused_path(self.output, picture_name(path)))
        self.detections.add(found, file_name=path)

    def detect_in_video(self, video: Video):
        """Write a video at the speed of the given one; a camera's lasts as long as it was seen."""
        if not video.has_fps and not video.is_camera:
            warn(f"{video.name} does not say how fast it is: {video.fps:g} frames a second")
        path, size = self.output / Path(video.name).stem, video.frame.shape[1::-1]
        # All detections here are certain enough to start a track: they are above the threshold.
        tracker = self.tracker and self.tracker(
            frame_rate=video.fps, track_activation_threshold=0, high_conf_det_threshold=0
        )
        number, start = 0, time.monotonic()
        frames = tqdm(video, video.name, video.num_frames or None, unit="frame", disable=None)
        with frames, VideoFile(path, video.fps, size) as file:
            for frame in frames:
                number, place = number + 1, file.num_frames
                found = self.detector(frame, threshold=self.threshold)
                if tracker:
                    add_track_ids(found, tracker, place / video.fps)
                drawn = draw_detections(frame[:, :, ::-1], found, self.metadata, keep_size=True)
                due = (time.monotonic() - start) * video.fps if video.is_camera else 0
                file.write(drawn, times=max(1, round(due) - place))
                name = f"{video.name}#{place}"
                self.detections.add(found, file_name=name, video=video.name, frame=place)
        speed = number / (time.monotonic() - start)
        tqdm.write(f"{video.name}: {count(number, 'frame')} at {speed:.1f} a second -> {file.path}")
        if number < video.num_frames:
            warn(f"{video.name} ends early: it announces {count(video.num_frames, 'frame')}")

    def summary(self) -> str:
        """Tell in a line how many images, frames and detections there were, and where they are."""
        nouns = Counter("frame" if "video" in entry else "image"
                        for entry in self.detections.images)
        parts = [count(nouns[noun], noun) for noun in ("image", "frame") if nouns[noun]]
        parts.append(count(len(self.detections.annotations), "detection"))
        text = f"{', '.join(parts)} with score >= {self.threshold:g} -> {self.output}"
        unreadable = f" ({count(self.num_unreadable, 'input')} could not be read)"
        return text + unreadable * (self.num_unreadable > 0)
