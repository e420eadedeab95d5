"""Promises of tools/demo.py on videos and cameras; OpenCV reads again what was written."""

import itertools
import os
from types import SimpleNamespace

import cv2
import demo
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from pycocotools.coco import COCO

from projects.stageinteractor.analysis import detect_files
from projects.stageinteractor.drawing import video
from projects.stageinteractor.drawing.style import COLORS
from support.demos import Finder, fail, file_names, run, save


def frames_of(number, size):
    """Smooth, reddish frames (H, W, 3), BGR, each brighter than the one before."""
    width, height = size
    ramp = np.linspace(0, 80, width * height).reshape(height, width, 1) + [0, 20, 60]
    return [(ramp + 100 * place / number).astype(np.uint8) for place in range(number)]


def make_clip(path, number=8, size=(64, 48), fps=12.5, codec="MJPG"):
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*codec), fps, size)
    for frame in frames_of(number, size):
        writer.write(frame)
    writer.release()
    return path


def read(path):
    """Frames of a video, and how many a second."""
    capture, frames = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG), []
    while (frame := capture.read()[1]) is not None:
        frames.append(frame)
    return frames, capture.get(cv2.CAP_PROP_FPS)


class FakeCapture:
    """A camera, or a video without a speed, that shows a few frames."""

    def __init__(self, frames, fps=0, count=0):
        self.frames, self.fps, self.count = iter(frames), fps, count

    def read(self):
        frame = next(self.frames, None)
        return frame is not None, frame

    def isOpened(self):
        return True

    def get(self, name):
        return {cv2.CAP_PROP_FPS: self.fps, cv2.CAP_PROP_FRAME_COUNT: self.count}[name]

    def release(self):
        pass


@pytest.fixture
def finder(monkeypatch):
    finder = Finder()
    monkeypatch.setattr(demo, "load_detector", lambda *arguments, **options: finder)
    return finder


@pytest.fixture
def opened(monkeypatch):
    """Opens a fake capture in place of the next file or camera."""
    reader, captures = cv2.VideoCapture, []
    monkeypatch.setattr(
        video.cv2, "VideoCapture", lambda *given: captures.pop() if captures else reader(*given)
    )
    return captures.append


@pytest.fixture
def clip(tmp_path):
    return make_clip(tmp_path / "a clip.avi")


# ---- The video that is written


@pytest.mark.parametrize("size, fps", [((64, 48), 12.5), ((63, 47), 30000 / 1001), ((9, 8), 5)])
def test_it_has_the_frames_the_size_and_the_speed(finder, tmp_path, opened, size, fps):
    """Odd sides grow by a pixel. Nothing is found in these frames, which stay as they are."""
    frames = frames_of(8, size)
    opened(FakeCapture(frames, fps, 8))
    (tmp_path / "a.mp4").touch()
    run(tmp_path / "out", tmp_path / "a.mp4", more=["--threshold", "1"])
    written, speed = read(tmp_path / "out" / "a.webm")
    assert len(written) == 8 and speed == pytest.approx(fps, rel=1e-3)
    width, height = size
    for here, there in zip(written, frames):
        assert here.shape == (height + height % 2, width + width % 2, 3)
        assert abs(here[:height, :width].astype(int) - there).mean() < 6


def test_classes_have_the_colours_that_they_have_in_images(finder, tmp_path):
    """In every frame: the first class in the left half, the second one in the right half."""
    run(tmp_path / "out", make_clip(tmp_path / "clip.avi", size=(192, 128)))
    frames, _ = read(tmp_path / "out" / "clip.webm")
    assert len(frames) == 8
    for frame in frames:
        for half, color in ((frame[:, :90], COLORS[0]), (frame[:, 102:], COLORS[1])):
            distance = abs(half - 255 * np.array(to_rgb(color)[::-1])).max(axis=-1)
            assert (distance < 60).sum() > 100


def test_a_format_that_opencv_cannot_write(finder, tmp_path, clip, monkeypatch):
    monkeypatch.setattr(video, "CODEC", "H264")
    assert "OpenCV cannot write a video" in fail(tmp_path / "out", clip)


def test_frames_of_another_size_are_scaled(finder, tmp_path, opened):
    opened(FakeCapture(frames_of(3, (64, 48)) + frames_of(2, (128, 96)), fps=5))
    (tmp_path / "a.mp4").touch()
    result = run(tmp_path / "out", tmp_path / "a.mp4")
    assert [image["width"] for image in result["images"]] == [64] * 3 + [128] * 2
    assert result["annotations"][-1]["bbox"] == [64, 0, 64, 96]
    written, _ = read(tmp_path / "out" / "a.webm")
    assert [frame.shape for frame in written] == [(48, 64, 3)] * 5


def test_a_full_disk(finder, tmp_path, clip, monkeypatch):
    """OpenCV says that a frame was not written, and nothing else."""
    writer = cv2.VideoWriter

    class FullDisk:
        def __init__(self, *given):
            self.real, self.room = writer(*given), 5
            self.isOpened, self.release = self.real.isOpened, self.real.release

        def write(self, frame):
            self.room -= 1
            return self.room >= 0 and self.real.write(frame)

    monkeypatch.setattr(video.cv2, "VideoWriter", FullDisk)
    assert "No space left on device" in fail(tmp_path / "out", clip)
    assert len(read(tmp_path / "out" / "a clip.webm")[0]) == 5
    assert len(COCO(tmp_path / "out" / "detections.json").imgs) == 5


# ---- The JSON file, and what is said


def test_each_frame_is_an_image_of_the_file(finder, tmp_path, clip, capsys):
    picture = save(tmp_path / "a.png")
    result = run(tmp_path / "out", picture, clip)
    COCO(tmp_path / "out" / "detections.json")
    assert file_names(result) == [str(picture), *(f"{clip}#{place}" for place in range(8))]
    for place, image in enumerate(result["images"][1:]):
        assert (image["video"], image["frame"]) == (str(clip), place)
        assert (image["height"], image["width"]) == (48, 64)
    assert "video" not in result["images"][0]
    assert [item["image_id"] for item in result["annotations"]] == [*np.repeat(range(1, 10), 2)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{clip}: 8 frames at ")
    assert lines[0].endswith(f" a second -> {tmp_path / 'out' / 'a clip.webm'}")
    assert lines[1].startswith("1 image, 8 frames, 18 detections with score >= 0.3 -> ")


def test_the_model_sees_the_frames_in_bgr(finder, tmp_path, clip, monkeypatch):
    seen = []

    def look(self, image, **options):
        seen.append(image)
        return detect(self, image, **options)

    detect = Finder.__call__
    monkeypatch.setattr(Finder, "__call__", look)
    run(tmp_path / "out", clip)
    frames, _ = read(clip)
    assert len(seen) == 8 and all(map(np.array_equal, seen, frames))


def test_the_progress_bar_knows_how_many_frames_there_are(finder, tmp_path, clip, monkeypatch):
    bars, make_bar = [], detect_files.tqdm.__init__
    monkeypatch.setattr(
        detect_files.tqdm, "__init__",
        lambda bar, *given, **more: bars.append((given[1:], more["disable"]))
        or make_bar(bar, *given, **more),
    )
    run(tmp_path / "out", clip)
    assert bars == [(("inputs",), True), ((str(clip), 8), None)]  # None: if there is a terminal


# ---- Videos with something wrong


def test_a_video_that_is_cut_off(finder, tmp_path, clip, capsys):
    data = clip.read_bytes()
    clip.write_bytes(data[:int(len(data) * 0.9)])
    result = run(tmp_path / "out", clip)
    number = len(result["images"])
    assert 1 < number < 8
    assert len(read(tmp_path / "out" / "a clip.webm")[0]) == number
    assert f"warning: {clip} ends early: it announces 8 frames" in capsys.readouterr().err


def test_a_video_without_a_frame_or_a_speed(finder, tmp_path, opened, capfd):
    (tmp_path / "a.mp4").touch()
    neither = "neither an image nor a video with a frame"
    assert neither in fail(tmp_path / "out", tmp_path / "a.mp4")
    opened(FakeCapture([], fps=5))
    assert neither in fail(tmp_path / "out", tmp_path / "a.mp4")
    assert os.listdir(tmp_path / "out") == []
    for place, fps in enumerate((0, float("nan"), 90000)):
        opened(FakeCapture(frames_of(3, (64, 48)), fps, count=float("-inf")))
        run(tmp_path / str(place), tmp_path / "a.mp4")
        frames, speed = read(tmp_path / str(place) / "a.webm")
        assert (len(frames), speed) == (3, 25)
    warnings = capfd.readouterr().err.splitlines()  # that of the process: OpenCV is silent
    line = f"warning: {tmp_path / 'a.mp4'} does not say how fast it is: 25 frames a second"
    assert warnings == [line] * 3


def test_files_are_told_apart_by_name_or_content(tmp_path, clip):
    """A broken image is none without its name; what Pillow calls MPEG, it cannot read."""
    for name, content in {
        "broken.jpg": b"", "broken": b"", "a.mpg": bytes.fromhex("000001b3 14 00 f0 13 00000000"),
    }.items():
        (tmp_path / name).write_bytes(content)
    with Image.open(tmp_path / "a.mpg") as image:
        assert (image.format, image.size) == ("MPEG", (320, 240))
    save(tmp_path / "image", format="PNG")
    found = {path.name for path in tmp_path.iterdir() if detect_files.is_image(str(path))}
    assert found == {"broken.jpg", "image"}


# ---- Endings


def test_a_video_that_is_interrupted_can_be_played(finder, tmp_path, clip, monkeypatch, capsys):
    """Ctrl-C leaves out the inputs that follow, and keeps the frames before it."""
    detect = Finder.__call__

    def interrupt_fifth(self, image, **options):
        if self.calls == 4:
            raise KeyboardInterrupt
        return detect(self, image, **options)

    monkeypatch.setattr(Finder, "__call__", interrupt_fifth)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "out", clip, save(tmp_path / "a.png"))
    output = capsys.readouterr()
    assert ended.value.code == 130 and not output.out
    assert output.err.startswith("interrupted: 4 frames, 8 detections")
    assert len(read(tmp_path / "out" / "a clip.webm")[0]) == 4
    assert len(COCO(tmp_path / "out" / "detections.json").imgs) == 4


def test_a_video_without_a_finished_frame_leaves_no_file(finder, tmp_path, clip, monkeypatch):
    def interrupt(*image, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Finder, "__call__", interrupt)
    with pytest.raises(SystemExit):
        run(tmp_path / "out", clip)
    assert os.listdir(tmp_path / "out") == []


# ---- Cameras


def test_a_camera_is_shown_for_as_long_as_it_was_seen(finder, tmp_path, opened, monkeypatch):
    """The model takes 0.3 s for a frame: what a camera shows 10 times a second stands 3 times."""
    seconds = itertools.count(0, 0.3)
    monkeypatch.setattr(detect_files, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    frames = frames_of(4, (64, 48))
    opened(FakeCapture(frames, fps=10, count=-1))
    result = run(tmp_path / "out", 0, option=["--camera"], more=["--threshold", "1"])
    assert [image["frame"] for image in result["images"]] == [0, 3, 6, 9]
    assert {image["video"] for image in result["images"]} == {"camera 0"}
    written, speed = read(tmp_path / "out" / "camera 0.webm")
    assert len(written) == 12 and speed == 10
    for place, frame in enumerate(written):
        assert abs(frame.astype(int) - frames[place // 3]).mean() < 6


@pytest.mark.parametrize("number, message", [
    ("77", "no camera 77, or another program is using it"), ("-1", "no camera -1"),
])
def test_there_is_no_such_camera(finder, tmp_path, capfd, number, message):
    assert message in fail(tmp_path / "out", number, option=["--camera"])
    assert capfd.readouterr().err == "" and finder.calls == 0
