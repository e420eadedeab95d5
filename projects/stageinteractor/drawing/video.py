"""Videos and cameras, read and written by OpenCV."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from ..errors import UserError
from .detections import unused_path

# Keeps FFmpeg quiet about broken videos. It must be set before OpenCV first uses FFmpeg.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

# VP8 in WebM plays in browsers, even if it was cut off. OpenCV's packages have no H.264, and their
# VP9 takes seven times as long.
SUFFIX, CODEC = ".webm", "VP80"
USUAL_FPS, MAX_FPS = 25.0, 1000.0


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discard stderr, where OpenCV writes messages that no option turns off."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Video:
    """The frames of a video file, or of a camera until it is unplugged.

    Args:
        source: a file, or the number of a camera.

    Raises:
        UserError: no frame can be read.
    """

    def __init__(self, source: str | int):
        self.is_camera = isinstance(source, int)
        self.name = f"camera {source}" if self.is_camera else source
        if self.is_camera and source < 0:  # OpenCV 5.0 would crash
            raise UserError(f"no {self.name}: cameras are numbered from 0")
        with silence():
            self.capture = cv2.VideoCapture(source)
            self.is_read, self.frame = self.capture.read()
        if not self.is_read:
            raise UserError(
                f"no {self.name}, or another program is using it" if self.is_camera else
                f"cannot read {source}: neither an image nor a video with a frame"
            )
        fps, count = map(self.capture.get, (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
        self.has_fps = 0 < fps <= MAX_FPS
        self.fps = fps if self.has_fps else USUAL_FPS
        self.num_frames = int(count) if count > 0 else 0  # 0 if the file does not tell

    def __iter__(self) -> Iterator[np.ndarray]:
        """Frames (H, W, 3), BGR, uint8, in order and rotated as a player shows them."""
        while self.is_read:
            yield self.frame
            self.is_read, self.frame = self.capture.read()
        self.capture.release()


class VideoFile:
    """Writes a video, which is complete at the end of a ``with`` block.

    Odd sides grow by a pixel, because colours are coded for blocks of 2 x 2 pixels.

    Args:
        path: of the file, without a suffix; `SUFFIX` is added, and a number if it exists.
        fps: frames per second.
        size: width and height in pixels.

    Raises:
        UserError: OpenCV cannot write a video there.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int]):
        self.size, self.num_frames = size, 0
        even = tuple(side + side % 2 for side in size)
        self.path = unused_path(path.parent, path.name + SUFFIX)
        code = cv2.VideoWriter_fourcc(*CODEC)
        with silence():
            self.writer = cv2.VideoWriter(str(self.path), cv2.CAP_FFMPEG, code, fps, even)
        if not self.writer.isOpened():
            raise UserError(f"OpenCV cannot write a video to {path.parent}: is the disk full?")

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_):
        self.writer.release()
        if not self.num_frames:
            self.path.unlink(missing_ok=True)

    def write(self, frame: np.ndarray, times: int = 1):
        """Add a frame (H, W, 3), RGB, uint8, `times` times. It is scaled to the size of the video.

        Raises:
            OSError: the disk is full.
        """
        width, height = self.size
        if frame.shape[:2] != (height, width):
            frame = cv2.resize(frame, self.size)
        frame = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        frame = cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        for _ in range(times):
            with silence():
                is_written = self.writer.write(frame)
            if is_written is False:  # OpenCV before 5 returns None in any case
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self.num_frames += 1
