"""Promises of tools/convert_dataset.py: every box is where the annotation has it.

Boxes are compared with painted pixels (VOC) and with boxes written as shares (YOLO); files are read
back with pycocotools and Detectron2.
"""

import contextlib
import io
import json
import shlex

import numpy as np
import pytest
from annotated import (
    HEIGHT,
    NAMES,
    WIDTH,
    convert_voc,
    convert_yolo,
    error_of,
    make_voc,
    make_yolo,
    read,
    save_image,
    save_list,
    save_voc,
    voc_object,
)
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from hydra.core.override_parser.overrides_parser import OverridesParser
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from projects.stageinteractor.data.formats.dataset import CLIPPED, IMAGE_SUFFIXES, image_size
from projects.stageinteractor.data.formats.yolo import label_file


@pytest.fixture
def voc(tmp_path):
    return make_voc(tmp_path)


@pytest.fixture
def yolo(tmp_path):
    return make_yolo(tmp_path)


# Boxes


def test_voc_boxes_cover_the_pixels_that_the_annotation_counts(tmp_path):
    """Random boxes with sides of one pixel and more, painted: pixel 1 is the first, the last is in.
    """
    rng = np.random.default_rng(0)
    low = rng.integers(1, [WIDTH + 1, HEIGHT + 1], (50, 2))
    high = np.minimum(low + rng.integers(0, 40, (50, 2)), [WIDTH, HEIGHT])
    written = [*np.hstack([low, high]).tolist(), [1, 1, 1, 1], [WIDTH, HEIGHT, WIDTH, HEIGHT]]
    save_image(tmp_path / "JPEGImages/a.png")
    save_voc(tmp_path, "a", [voc_object(box=box) for box in written])
    convert_voc(tmp_path, tmp_path / "out", splits=())
    for (x1, y1, x2, y2), (_, box) in zip(written, read(tmp_path / "out/all.json")["a.png"]):
        pixels = [[x1 <= x <= x2 and y1 <= y <= y2 for x in range(1, WIDTH + 1)]
                  for y in range(1, HEIGHT + 1)]
        rows, columns = np.nonzero(pixels)
        assert box[:2] == [columns.min(), rows.min()]
        assert box[2:] == [len(set(columns)), len(set(rows))]


def test_zero_based_voc_boxes_are_edges(tmp_path, capsys):
    save_image(tmp_path / "JPEGImages/a.png")
    boxes = (0, 0, WIDTH, HEIGHT), (10.5, 20, 30, 40.25)
    save_voc(tmp_path, "a", [voc_object(box=box) for box in boxes])
    convert_voc(tmp_path, tmp_path / "one", splits=())
    printed = capsys.readouterr().out
    assert f"1 {CLIPPED}" in printed and "add --zero-based: a.png" in printed
    convert_voc(tmp_path, tmp_path / "out", "--zero-based", splits=())
    assert "clipped" not in capsys.readouterr().out
    found = [box for _, box in read(tmp_path / "out/all.json")["a.png"]]
    assert found == [[0, 0, WIDTH, HEIGHT], [10.5, 20, 19.5, 20.25]]


def test_yolo_boxes_come_back(yolo):
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.random((50, 2, 2)), axis=1).reshape(-1, 4) * ([WIDTH, HEIGHT] * 2)
    center, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    rows = np.hstack([center, size]) / ([WIDTH, HEIGHT] * 2)
    labels = [" ".join(["0", *(f"{value:.6f}" for value in row)]) for row in rows]
    save_list(yolo / "labels/train/ä b.txt", labels)
    convert_yolo(yolo, yolo / "out")
    found = [box for _, box in read(yolo / "out/train.json")["train/ä b.jpg"]]
    np.testing.assert_allclose(found, np.hstack([boxes[:, :2], size]), atol=2e-3)


@pytest.mark.parametrize(
    "row, box",
    [
        ("1.0 0.5 0.5 1 1.0000005", [0, 0, 100, 60]),  # rounded up, class as numpy.savetxt writes
        ("1 0.9 0.5 0.4 0.5", [70, 15, 30, 30]),  # over the right edge
        ("1 0.1 0.5 0.3 0.25 0.2 0.75", [10, 15, 20, 30]),  # a polygon
        ("1 0.1 0.2 0.4 0.1 0.5 0.3 0.2 0.4", [10, 6, 40, 18]),  # an oriented box
    ],
)
def test_yolo_rows_of_other_kinds(yolo, row, box):
    save_list(yolo / "labels/train/ä b.txt", [row])
    convert_yolo(yolo, yolo / "out")
    assert read(yolo / "out/train.json")["train/ä b.jpg"] == [("big cat", box)]


# Images, splits and classes


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_sizes_are_those_that_detectron2_sees(tmp_path, suffix, orientation):
    path = tmp_path / f"a{suffix}"
    save_image(path, orientation=orientation)
    assert image_size(path) == read_image(str(path), "RGB").shape[1::-1]


def test_voc_size_is_that_of_the_turned_image(voc):
    save_image(voc / "JPEGImages/x.y.jpg", orientation=6)
    assert "<size> is 100 x 60, but x.y.jpg has 60 x 100 pixels" in error_of(convert_voc, voc)
    save_voc(voc, "x.y", [voc_object(box=(1, 1, 60, 100))], size=(60, 100))
    convert_voc(voc, voc / "out")
    assert read(voc / "out/val.json") == {"x.y.jpg": [("dog", [0, 0, 60, 100])]}


@pytest.mark.parametrize("size", [None, (0, 0)])
def test_voc_size_may_be_unknown(voc, size):
    save_voc(voc, "x.y", [voc_object()], size=size)
    convert_voc(voc, voc / "out")
    (image,) = json.loads((voc / "out/val.json").read_text())["images"]
    assert (image["width"], image["height"]) == (WIDTH, HEIGHT)


def test_voc_splits_share_categories_and_keep_images_without_objects(voc):
    convert_voc(voc, voc / "out")
    assert read(voc / "out/train.json") == {
        "ä b.jpg": [("dog", [10, 20, 20, 20]), ("bird", [0, 0, WIDTH, HEIGHT])],
        "empty.jpg": [],
    }
    assert read(voc / "out/val.json") == {"x.y.jpg": [("cat", [4, 4, 1, 1])]}
    convert_voc(voc, voc / "alone", splits=["train.txt"])
    for path in ("out/train.json", "out/val.json", "alone/train.json"):
        categories = json.loads((voc / path).read_text())["categories"]
        assert categories == [
            {"id": 1, "name": "bird"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}
        ]


def test_voc_classes_can_be_given_in_order(voc):
    save_list(voc / "classes.txt", ["dog", "traffic light", "cat", "bird"])
    convert_voc(voc, voc / "names", "--classes", "dog", "traffic light", "cat", "bird")
    convert_voc(voc, voc / "file", "--classes", str(voc / "classes.txt"))
    for folder in ("names", "file"):
        categories = json.loads((voc / folder / "val.json").read_text())["categories"]
        assert [c["name"] for c in categories] == ["dog", "traffic light", "cat", "bird"]
    error = error_of(convert_voc, voc, "--classes", "dog", "cat")
    assert "ä b.xml:3: class 'bird' is not in --classes" in error
    assert "'dog' is there twice" in error_of(convert_voc, voc, "--classes", "dog", "dog")


def test_voc_without_splits_is_one_file(voc, capsys):
    save_image(voc / "JPEGImages/unannotated.jpg")
    convert_voc(voc, voc / "out", splits=())
    assert list(read(voc / "out/all.json")) == [f"{name}.jpg" for name in sorted(NAMES)]
    printed = capsys.readouterr().out
    assert "files left out: 1\n  1 images without an XML file: unannotated.jpg" in printed


def test_parts_of_a_voc_object_are_no_objects(voc):
    part = f"<part>{voc_object('head', (12, 22, 13, 23))[8:-9]}</part>"
    save_voc(voc, "x.y", [voc_object("cat").replace("</object>", f"{part}</object>")])
    convert_voc(voc, voc / "out")
    assert read(voc / "out/val.json") == {"x.y.jpg": [("cat", [10, 20, 20, 20])]}


def test_difficult_objects_are_neither_missed_nor_false(voc):
    """Finding a difficult object, or not finding it, leaves AP at 100 %."""
    difficult = "<difficult>1</difficult>"
    save_voc(voc, "x.y", [voc_object(), voc_object(box=(51, 11, 80, 50), extra=difficult)])
    convert_voc(voc, voc / "out")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(voc / "out/val.json"))
        assert [a["iscrowd"] for a in coco.dataset["annotations"]] == [0, 1]
        for count in (1, 2):
            found = [{k: a[k] for k in ("image_id", "category_id", "bbox")}
                     | {"score": a["id"] / 9} for a in coco.dataset["annotations"][:count]]
            evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert evaluation.stats[0] == pytest.approx(1)


def test_yolo_splits_may_be_folders_and_lists(yolo):
    convert_yolo(yolo, yolo / "out")
    assert read(yolo / "out/train.json") == {
        "train/deep/empty.jpg": [],
        "train/ä b.jpg": [("big cat", [0, 0, 100, 60]), ("dog", [10, 20, 20, 20])],
    }
    assert read(yolo / "out/val.json") == {"val/x.y.jpg": []}
    assert not (yolo / "out/test.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "train: [images/train, val.txt, images/train/deep]\nnames: [dog, big cat]\nnc: 2",
        "train: ../images\nnames: [dog, big cat]",  # as Roboflow exports it
        "path: {root}\ntrain: images\nnames:\n  0: dog\n  1: big cat",
    ],
)
def test_yolo_data_may_be_written_in_several_ways(yolo, text):
    (yolo / "data.yaml").write_text(text.format(root=yolo))
    convert_yolo(yolo, yolo / "out")
    assert set(read(yolo / "out/train.json")) == {
        "train/ä b.jpg", "train/deep/empty.jpg", "val/x.y.jpg"
    }


def test_labels_replace_the_last_folder_of_images(tmp_path):
    assert label_file(tmp_path / "images/images/a.b.jpg") == tmp_path / "images/labels/a.b.txt"
    assert label_file(tmp_path / "my images/a.jpg") == tmp_path / "my images/a.txt"


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_detectron2_loads_what_is_written_where_the_tool_says(kind, request, capsys):
    root = request.getfixturevalue(kind)
    (convert_voc if kind == "voc" else convert_yolo)(root, root / "out")
    printed = capsys.readouterr().out.splitlines()
    assert f"{root}/out/train.json: 2 images, 1 of them without objects; 2 boxes" in printed[0]
    overrides = [word for word in shlex.split(printed[-1]) if "=" in word]
    parsed = OverridesParser.create().parse_overrides(overrides)
    options = {override.key_or_group: override.value() for override in parsed}
    name = f"converted {kind}"
    records = load_coco_json(options["dataset.train"], options["dataset.images"], name)
    assert len(records) == 2
    for record in records:
        assert read_image(record["file_name"]).shape[:2] == (record["height"], record["width"])
        for item in record["annotations"]:
            assert item["bbox_mode"] == BoxMode.XYWH_ABS and item["category_id"] in range(3)
