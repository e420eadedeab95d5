"""Promises of ``tools/demo.py --track``: which object is which from frame to frame, in files."""

import itertools
import sys
from types import SimpleNamespace

import cv2
import demo
import numpy as np
import pytest
import torch
from detectron2.utils.visualizer import Visualizer

from projects.stageinteractor.analysis import detect_files
from projects.stageinteractor.drawing import video
from projects.stageinteractor.drawing.detections import class_metadata, draw_detections
from support.demos import CATEGORIES, Finder, detect, fail, run, save

NUMBER, SIZE = 50, (240, 160)


class Crossing(Finder):
    """Sees two objects cross, each a class of its own, with noise, gaps and in any order."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, image, threshold):
        place, self.calls = self.calls % NUMBER, self.calls + 1
        step = 190 * place / NUMBER
        truth = np.array([[step, 60, step + 30, 100], [200 - step, 75, 230 - step, 115]])
        boxes = (truth + self.rng.normal(0, 1, (2, 4))).clip(0, [*SIZE, *SIZE])
        seen = [index for index in self.rng.permutation(2) if self.rng.random() > 0.15]
        size = image.shape[:2]
        return detect(boxes[seen], self.rng.uniform(threshold, 1, len(seen)), seen, size)


@pytest.fixture
def use(monkeypatch):
    def replace(finder):
        monkeypatch.setattr(demo, "load_detector", lambda *arguments, **options: finder)

    return replace


def make_clip(path, number=NUMBER):
    writer = cv2.VideoWriter(
        str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"MJPG"), 25, SIZE
    )
    for _ in range(number):
        writer.write(np.zeros((*SIZE[::-1], 3), np.uint8))
    writer.release()
    return path


def tracks_of(result, name):
    """{category: the ids of its detections in a video, in order; None where there is none}."""
    inside = {image["id"] for image in result["images"] if image.get("video") == str(name)}
    items = [item for item in result["annotations"] if item["image_id"] in inside]
    return {
        category["id"]: [
            item.get("track_id") for item in items if item["category_id"] == category["id"]
        ] for category in CATEGORIES
    }


@pytest.mark.parametrize("seed", range(3))
def test_objects_keep_their_ids_when_they_cross(use, tmp_path, seed):
    """In two videos, each of which numbers its own objects from 0."""
    use(Crossing(seed))
    clips = [make_clip(tmp_path / name) for name in ("a.avi", "b.avi")]
    result = run(tmp_path / "out", *clips, more=["--track"])
    for clip in clips:
        tracks = tracks_of(result, clip)
        ids = {category: set(found) - {None} for category, found in tracks.items()}
        assert sorted(map(tuple, ids.values())) == [(0,), (1,)]
        for found in tracks.values():
            assert len(found) < NUMBER and found.count(None) < 8
            known = [track is not None for track in found]
            assert known == sorted(known)  # one has an id from some frame on


def test_detections_are_the_same_otherwise(use, tmp_path):
    """Ids are added to those in videos, none to those in images."""
    clip, picture = make_clip(tmp_path / "a.avi", 5), save(tmp_path / "a.png")
    use(Finder())
    plain = run(tmp_path / "plain", picture, clip)
    tracked = run(tmp_path / "tracked", picture, clip, more=["--track"])
    ids = [item.pop("track_id", None) for item in tracked["annotations"]]
    assert ids == [None] * 4 + [0, 1] * 4 and all(type(track) is int for track in ids[4:])
    assert tracked == plain


def test_the_tracker_knows_when_a_frame_was_seen(use, tmp_path, monkeypatch):
    """A camera's frames are as far apart as the model takes; a video's are even."""
    rates, times = [], []

    class Recorder:
        def __init__(self, frame_rate, **options):
            rates.append(frame_rate)

        def update(self, detections, timestamp):
            times.append(timestamp)
            detections.tracker_id = np.arange(len(detections))
            return detections

    monkeypatch.setattr(detect_files, "tracker_class", lambda: Recorder)
    use(Finder())
    run(tmp_path / "file", make_clip(tmp_path / "a.avi", 4), more=["--track"])
    assert times == pytest.approx([0, 0.04, 0.08, 0.12])
    seconds = itertools.count(0, 0.3)
    monkeypatch.setattr(detect_files, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    frames = iter([np.zeros((48, 64, 3), np.uint8)] * 4)
    monkeypatch.setattr(video.cv2, "VideoCapture", lambda *given: SimpleNamespace(
        read=lambda: (frame := next(frames, None)) is not None and (True, frame) or (False, None),
        get=lambda name: 10 if name == cv2.CAP_PROP_FPS else -1, release=lambda: None,
    ))
    run(tmp_path / "camera", 0, option=["--camera"], more=["--track"])
    assert times[4:] == pytest.approx([0, 0.3, 0.6, 0.9]) and rates == [25, 10]


def test_the_id_is_in_the_label(monkeypatch):
    texts, draw_text = [], Visualizer.draw_text
    monkeypatch.setattr(
        Visualizer, "draw_text",
        lambda self, text, *given, **more: texts.append(text)
        or draw_text(self, text, *given, **more),
    )
    found = detect([[5, 5, 50, 60], [90, 20, 130, 40], [10, 80, 40, 95]], [0.9, 0.8, 0.7],
                   [1, 0, 1], (100, 150))
    image, metadata = np.full((100, 150, 3), 90, np.uint8), class_metadata(["cat", "dog"])
    plain = draw_detections(image, found, metadata)
    found.track_ids = torch.tensor([3, -1, 0])
    labelled = draw_detections(image, found, metadata)
    assert set(texts[:3]) == {"dog 90%", "cat 80%", "dog 70%"}
    assert set(texts[3:]) == {"dog #3 90%", "cat 80%", "dog #0 70%"}
    assert found.pred_classes.tolist() == [1, 0, 1] and labelled.shape == plain.shape
    for corner in ((slice(200, 220), slice(680, 700)), (slice(495, 512), slice(200, 220))):
        assert (plain[corner] != 90).any() and (labelled[corner] == plain[corner]).all()  # colours


def test_what_tracking_needs_is_named(use, tmp_path, monkeypatch):
    use(Finder())
    monkeypatch.setitem(sys.modules, "trackers", None)
    assert fail(tmp_path / "out", save(tmp_path / "a.png"), more=["--track"]) == (
        "error: --track needs trackers: pip install -e '.[track]', then\n"
        "pip install --no-deps 'trackers>=2.6.1,<3'"
    )
