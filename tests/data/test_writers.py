"""Promises of data.formats.writers: other programs read the detections that it writes."""

import json
from xml.etree import ElementTree as ET

import demo
import pytest
from PIL import Image

from projects.stageinteractor.data.formats import FORMATS, Mistakes, read_voc, read_yolo
from projects.stageinteractor.data.formats.writers import write_dataset
from support.demos import Finder, fail, run, save

CLASSES = ["cat & <dog>", "кошка", "3"]
BOXES = [[10.5, 3.25, 20, 30], [0, 0, 64, 48], [1.13, 2.27, 0.02, 5], [5, 5, 0, 4]]


@pytest.fixture
def content(tmp_path):
    """Detections in two images of the same name, the second of which is turned by its tag."""
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = [
        save(tmp_path / "a/photo.png", (64, 48)),
        save(tmp_path / "b/Photo.jpg", (48, 64), exif=exif),
        save(tmp_path / "b/empty.png", (64, 48)),
    ]
    return {
        "categories": [{"id": id, "name": name} for id, name in zip((7, 2, 40), CLASSES)],
        "images": [
            {"id": number, "file_name": str(path), "width": 64, "height": 48}
            for number, path in enumerate(paths, 1)
        ],
        "annotations": [
            {"id": number, "image_id": 1 + number % 2, "category_id": (7, 2, 40)[number % 3],
             "bbox": box, "score": 0.5}
            for number, box in enumerate(BOXES)
        ],
    }


def objects(dataset):
    """Class, and x, y, w, h of every object, by the name of the image."""
    (images,) = dataset.splits.values()
    return {
        image.path.name: [
            (box.category, *box.corners[:2], box.corners[2] - box.corners[0],
             box.corners[3] - box.corners[1])
            for box in image.boxes
        ]
        for image in images
    }


EXPECTED = {
    "photo.png": [(0, *BOXES[0]), (2, *BOXES[2])],
    "Photo_.jpg": [(1, *BOXES[1])],  # without the box that has no area
    "empty.png": [],
}


@pytest.mark.parametrize("form", ["yolo", "voc"])
def test_the_converters_read_what_is_written(content, tmp_path, form):
    write_dataset(content, form, tmp_path / "out")
    mistakes = Mistakes()
    if form == "yolo":
        dataset = read_yolo(tmp_path / "out/data.yaml", mistakes)
    else:
        dataset = read_voc(
            tmp_path / "out/Annotations", tmp_path / "out/JPEGImages", mistakes, classes=CLASSES
        )
    assert not mistakes and dataset.classes == CLASSES
    assert not any(dataset.remarks.values()) and not any(dataset.unused.values())
    found = objects(dataset)
    assert found.keys() == EXPECTED.keys()
    for name, expected in EXPECTED.items():
        for one, other in zip(found[name], expected, strict=True):
            assert one == pytest.approx(other, abs=2e-3)


def test_label_studio_gets_percentages_of_the_upright_image(content, tmp_path):
    write_dataset(content, "labelstudio", tmp_path / "out")
    tasks = json.loads((tmp_path / "out/tasks.json").read_text())
    found = {}
    for task in tasks:
        name = task["data"]["image"].removeprefix("/data/local-files/?d=images/")
        (prediction,) = task["predictions"]
        found[name] = []
        for result in prediction["result"]:
            value, size = result["value"], (result["original_width"], result["original_height"])
            (label,) = value["rectanglelabels"]
            corners = [value[key] / 100 * side for key, side in
                       zip(("x", "y", "width", "height"), size * 2)]
            found[name].append((CLASSES.index(label), *corners))
            assert (result["type"], result["from_name"], result["to_name"], result["score"]) == (
                "rectanglelabels", "label", "image", 0.5)
    assert found.keys() == EXPECTED.keys()
    for name, expected in EXPECTED.items():
        assert (tmp_path / "out/images" / name).is_file()
        for one, other in zip(found[name], expected, strict=True):
            assert one == pytest.approx(other)
    view = ET.parse(tmp_path / "out/labels.xml").getroot()
    labels = view.find("RectangleLabels[@name='label'][@toName='image']")
    assert [label.get("value") for label in labels] == CLASSES
    assert view.find("Image[@name='image']").get("value") == "$image"


@pytest.mark.parametrize("form", FORMATS)
def test_the_demo_writes_them_beside_its_own_file(monkeypatch, tmp_path, form, capsys):
    monkeypatch.setattr(demo, "load_detector", lambda *arguments, **options: Finder())
    photo = save(tmp_path / "photo.png")
    coco = run(tmp_path / "out", photo, more=["--format", form])
    assert [item["file_name"] for item in coco["images"]] == [str(photo)]
    copy = tmp_path / "out" / FORMATS[form].images / "photo.png"
    assert copy.read_bytes() == photo.read_bytes()
    (tmp_path / "out/detections.json").unlink()
    message = fail(tmp_path / "out", photo, more=["--format", form])
    assert FORMATS[form].images in message and "--output" in message


@pytest.mark.parametrize("form, name", [
    (form, name) for form in FORMATS for name in (FORMATS[form].images, *FORMATS[form].others)
])
def test_what_is_there_already_stays(monkeypatch, tmp_path, form, name):
    """For example, the data.yaml of somebody's own data set."""
    monkeypatch.setattr(demo, "load_detector", lambda *arguments, **options: Finder())
    photo, mine = save(tmp_path / "photo.png"), tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    message = fail(tmp_path / "out", photo, more=["--format", form])
    assert f"holds {name} already" in message and mine.read_text() == "mine"


def test_nothing_is_written_that_is_not_looked_for(content, tmp_path):
    for form, known in FORMATS.items():
        write_dataset(content, form, tmp_path / form)
        files = [path.relative_to(tmp_path / form).as_posix()
                 for path in (tmp_path / form).rglob("*") if path.is_file()]
        assert files and all(path.startswith((known.images, *known.others)) for path in files)


def test_a_video_has_no_images_to_label(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "load_detector", lambda *arguments, **options: Finder())
    monkeypatch.setattr("projects.stageinteractor.analysis.detect_files.Video",
                        lambda source: type("Clip", (), {"name": source}))
    (tmp_path / "clip.mp4").write_bytes(b"clip")
    message = fail(tmp_path / "out", tmp_path / "clip.mp4", more=["--format", "voc"])
    assert "clip.mp4 is a video" in message and "--format voc" in message
