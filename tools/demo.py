#!/usr/bin/env python
"""Detect objects in images, videos or what a camera sees; write pictures, videos and JSON.

    python tools/demo.py [--config-file CONFIG] --checkpoint FILE --input PATH ... \\
        --output FOLDER [key=value ...]
    python tools/demo.py [--config-file CONFIG] --checkpoint FILE --camera 0 --output FOLDER

An input is an image, a video, a folder of images or a pattern in quotes, in which ** stands for
any folders. A run's own config.yaml is a CONFIG, too, and its data set need not be there.

FOLDER gets each image under its name, with Detectron2's drawings of what was found, enlarged if it
is small; each video, as WebM and without its sound; and detections.json, in COCO's instance format
with scores and boxes in pixels of the input.
Ctrl-C ends early, and keeps what has been done.
"""

import argparse
import glob
import os
import sys
import time
from pathlib import Path
from collections.abc import Sequence

import _start
import numpy as np
from detectron2.structures import Instances
from tqdm import tqdm

from projects.stageinteractor.data import read_picture
from projects.stageinteractor.data import open_image
from projects.stageinteractor.data.reading import IMAGE_SUFFIXES
from projects.stageinteractor.files import prepare_output
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference import Detector, load_detector
from projects.stageinteractor.drawing.detections import (
    DetectionFile,
    class_metadata,
    draw_detections,
    overlay_detections,
    picture_name,
    save_picture,
    unused_path,
)
from projects.stageinteractor.drawing.video import Video, VideoFile

RESULT = "detections.json"


def find_inputs(texts: Sequence[str]) -> list[str]:
    """The files that paths and patterns mean, each once; of a folder, its images, with a warning
    if it holds others.

    Raises:
        UserError: there is no such file, or none in the folder.
    """
    files = []
    for text in texts:
        if os.path.isfile(text):
            found = [text]
        elif os.path.isdir(text):
            within = sorted(filter(os.path.isfile, glob.glob(os.path.join(glob.escape(text), "*"))))
            found = [path for path in within if has_image_name(path)]
            if not found:
                raise UserError(f"no images in {text}, as far as the ends of names tell")
            if others := len(within) - len(found):
                warn(f"{text}: {count(others, 'other file')} left out; give videos by their names")
        else:
            found = sorted(filter(os.path.isfile, glob.glob(text, recursive=True)))
            if not found:
                hint = ": overrides come after --output FOLDER" if "=" in text else ""
                raise UserError(f"no file {text}{hint}")
        files += found
    return list(dict.fromkeys(files))


def has_image_name(path: str) -> bool:
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def is_image(path: str) -> bool:
    """Whether a file is an image, by its name or else by its content."""
    if has_image_name(path):
        return True
    try:
        with open_image(path):
            return True
    except Exception:  # Pillow's readers raise all sorts
        return False


def open_input(path: str) -> np.ndarray | Video:
    """An image (H, W, 3), BGR, uint8, turned as its EXIF tag says, or a video.

    Raises:
        UserError: it cannot be read.
    """
    if not is_image(path):
        return Video(path)
    return read_picture(path, "BGR")


def warn(text: object):
    tqdm.write(f"warning: {text}", file=sys.stderr)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


class Demo:
    """Detects in one input after the other, and keeps count.

    Args:
        detector: a model.
        threshold: least score of what is drawn and noted.
        output: the folder to write to.
        info: for the JSON file.
    """

    def __init__(self, detector: Detector, threshold: float, output: Path, info: dict):
        self.detector, self.threshold = detector, threshold
        self.output = output
        self.metadata = class_metadata(detector.class_names)
        self.detections = DetectionFile(detector.categories, info)
        self.num_images = self.num_frames = self.num_unreadable = 0

    def run(self, inputs: Sequence[str | Video]):
        """Detect in files and cameras; one that cannot be read is left out, with a warning.

        Whatever ends it, what has been detected is written.

        Raises:
            UserError: none can be read, or a video cannot be written.
            OSError: a picture or a video cannot be written.
        """
        try:
            for source in tqdm(inputs, "inputs", disable=len(inputs) == 1 or None):
                self.detect_in(source, alone=len(inputs) == 1)
        finally:
            if self.detections.pictures:
                self.detections.write(self.output / RESULT)
        if self.num_unreadable == len(inputs):
            raise UserError("none of the inputs can be read")

    def detect_in(self, source: str | Video, *, alone: bool):
        """Detect in one input. Raises UserError if it is ``alone`` and cannot be read."""
        try:
            opened = open_input(source) if isinstance(source, str) else source
        except UserError as error:
            if alone:
                raise
            warn(error)
            self.num_unreadable += 1
            return
        if isinstance(opened, Video):
            self.detect_in_video(opened)
        else:
            self.detect_in_image(source, opened)

    def detect_in_image(self, path: str, image: np.ndarray):
        """Write the picture of an image (H, W, 3), BGR, uint8."""
        found = self.detect(image)
        picture = draw_detections(image[:, :, ::-1], found, self.metadata)
        save_picture(picture, unused_path(self.output, picture_name(path)))
        self.detections.add(found, file_name=path)
        self.num_images += 1

    def detect_in_video(self, video: Video):
        """Write a video as fast as the one given: what a camera sees is shown for as long."""
        if not video.has_fps and not video.is_camera:
            warn(f"{video.name} does not say how fast it is: {video.fps:g} frames a second")
        before, start = self.num_frames, time.monotonic()
        path, size = self.output / Path(video.name).stem, video.frame.shape[1::-1]
        frames = tqdm(video, video.name, video.num_frames or None, unit="frame", disable=None)
        with frames, VideoFile(path, video.fps, size) as file:
            for frame in frames:
                place = file.num_frames
                found = self.detect(frame)
                drawn = overlay_detections(frame[:, :, ::-1], found, self.metadata)
                due = (time.monotonic() - start) * video.fps if video.is_camera else 0
                file.write(drawn, times=max(1, round(due) - place))
                name = f"{video.name}#{place}"
                self.detections.add(found, file_name=name, video=video.name, frame=place)
                self.num_frames += 1
        number = self.num_frames - before
        speed = number / (time.monotonic() - start)
        tqdm.write(f"{video.name}: {count(number, 'frame')} at {speed:.1f} a second -> {file.path}")
        if number < video.num_frames:
            warn(f"{video.name} ends early: it announces {count(video.num_frames, 'frame')}")

    def detect(self, image: np.ndarray) -> Instances:
        """What is found in an image (H, W, 3), BGR, uint8."""
        found = self.detector(image)
        return found[found.scores >= self.threshold]

    def summary(self) -> str:
        numbers = {"image": self.num_images, "frame": self.num_frames}
        parts = [count(number, noun) for noun, number in numbers.items() if number]
        parts.append(count(self.detections.num_detections, "detection"))
        text = f"{', '.join(parts)} with score >= {self.threshold:g} -> {self.output}"
        left_out = f" ({count(self.num_unreadable, 'input')} could not be read)"
        return text + left_out * (self.num_unreadable > 0)


def prepare(args: argparse.Namespace) -> tuple[Demo, Sequence[str | Video]]:
    """All that can fail before the first picture. Raises UserError."""
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold:g}: scores are between 0 and 1")
    inputs = find_inputs(args.input) if args.input else [Video(args.camera)]
    detector = load_detector(args.checkpoint, args.config_file, args.overrides)
    info = {name: getattr(args, name) for name in ("config_file", "checkpoint", "threshold")}
    output = prepare_output(args.output, RESULT)
    return Demo(detector, args.threshold, output, info), inputs


@_start.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="default: the checkpoint's own")
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH")
    source.add_argument("--camera", type=int, metavar="NUMBER", help="0 is the first one")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument(
        "--threshold", type=float, default=0.3, metavar="SCORE",
        help="least score of what is drawn and written (%(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    demo, inputs = prepare(args)
    try:
        demo.run(inputs)
    except OSError as error:
        raise UserError(f"cannot write to {args.output}: {error.strerror}") from error
    except KeyboardInterrupt:
        print(f"interrupted: {demo.summary()}", file=sys.stderr)
        sys.exit(130)
    print(demo.summary())


if __name__ == "__main__":
    main()
