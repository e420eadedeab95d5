"""Promises of tools/convert.py dataset: every box is where the annotation has it.

Boxes are compared with painted pixels (VOC) and with boxes written as shares (YOLO); files are read
back with pycocotools and Detectron2.
"""

import contextlib
import io
import json
import shlex
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from hydra.core.override_parser.overrides_parser import OverridesParser
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from projects.stageinteractor.data import read_image
from projects.stageinteractor.data.formats.conversion import CLIPPED, RENAMED, labelled_image
from projects.stageinteractor.data.formats.yolo import label_file
from projects.stageinteractor.data.reading import IMAGE_SUFFIXES
from support.annotated import (
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
def test_image_sizes_are_those_that_training_sees(tmp_path, suffix, orientation):
    path = tmp_path / f"a{suffix}"
    save_image(path, orientation=orientation)
    assert labelled_image(path)[1:3] == read_image(str(path), "RGB").shape[1::-1]


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


# Nothing is lost without a word


def summary_of(capsys):
    """Of what conversion prints: the lines from the remarks on, without the last."""
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(("remarks", "files left")))
    return "\n".join(lines[start:-1])


def test_voc_files_may_lie_in_folders(voc, capsys):
    """Also with one name in two folders; a list may name the folder, or leave it out."""
    for folder in "ab":
        for kind in ("Annotations", "JPEGImages"):
            (voc / kind / folder).mkdir()
        save_image(voc / f"JPEGImages/{folder}/same.png")
    save_voc(voc, "a/same", [voc_object("cat")])
    save_voc(voc, "b/same", [voc_object("bird")])
    for kind, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        (voc / f"{kind}/x.y.{suffix}").rename(voc / f"{kind}/b/x.y.{suffix}")
    save_list(voc / "val.txt", ["a/same", "b/same", "x.y"])
    convert_voc(voc, voc / "out")
    assert read(voc / "out/val.json") == {
        "a/same.png": [("cat", [10, 20, 20, 20])], "b/same.png": [("bird", [10, 20, 20, 20])],
        "b/x.y.jpg": [("cat", [4, 4, 1, 1])],
    }
    assert summary_of(capsys) == "files left out: 0"
    save_list(voc / "val.txt", ["same"])
    (voc / "out").rename(voc / "earlier")
    error = error_of(convert_voc, voc, splits=["val.txt"])
    assert "a/same.xml" in error and "b/same.xml" in error


@pytest.mark.parametrize("name", ["X.Y.JPG", "deep/x.y.jpg"])
def test_voc_images_are_found_by_a_name_that_is_nearly_right(voc, name, capsys):
    (voc / "JPEGImages/deep").mkdir()
    (voc / "JPEGImages/x.y.jpg").rename(voc / "JPEGImages" / name)
    convert_voc(voc, voc / "out")
    assert read(voc / "out/val.json") == {name: [("cat", [4, 4, 1, 1])]}
    assert f"1 images {RENAMED}: {Path(name).name}" in summary_of(capsys)


def test_an_image_that_two_voc_files_claim_is_a_mistake(voc):
    """But the one that has its exact name gets it, if there is such a one."""
    save_voc(voc, "X.Y", [voc_object("cat")])
    error = error_of(convert_voc, voc, splits=())
    assert "X.Y.xml: needs one image" in error and "mistakes: 1\n" in error
    (voc / "Annotations/x.y.xml").rename(voc / "Annotations/X.y.xml")
    error = error_of(convert_voc, voc, splits=())
    assert "X.Y.xml: " in error and "X.y.xml: " in error and "mistakes: 2\n" in error


def test_voc_files_that_are_not_used_are_counted(voc, capsys):
    save_image(voc / "JPEGImages/unannotated.jpg")
    save_voc(voc, "unlisted", [voc_object("cat")])
    save_image(voc / "JPEGImages/unlisted.png")
    (voc / "JPEGImages/photo.heic").touch()
    (voc / "JPEGImages/.DS_Store").touch()
    convert_voc(voc, voc / "out")
    lines = summary_of(capsys).splitlines()
    assert lines[0] == "files left out: 5"
    assert sorted(lines[1:]) == [
        "  1 hidden: .DS_Store",
        "  1 images without an XML file: unannotated.jpg",
        "  1 neither XML nor images: photo.heic",
        "  2 in no list of --splits: unlisted.xml, unlisted.png",
    ]


@pytest.mark.parametrize("written, box", [
    ((-0.5, 1, WIDTH + 1, HEIGHT + 0.25), [0, 0, WIDTH, HEIGHT]),
    ((91, 51, WIDTH + 1, HEIGHT + 1), [90, 50, 10, 10]),
])
def test_voc_boxes_up_to_a_pixel_over_the_border_are_clipped(voc, written, box, capsys):
    save_voc(voc, "x.y", [voc_object("cat", written)])
    if written[0] < 0:
        assert "not inside the image" in error_of(convert_voc, voc)  # 1.5 pixels, counted from 1
        save_voc(voc, "x.y", [voc_object("cat", (0, *written[1:]))])
    convert_voc(voc, voc / "out")
    assert read(voc / "out/val.json") == {"x.y.jpg": [("cat", box)]}
    assert f"1 {CLIPPED}" in summary_of(capsys)


def test_yolo_boxes_over_the_border_are_clipped_with_a_remark(yolo, capsys):
    save_list(yolo / "labels/train/ä b.txt", [
        "0 0.5 0.5 1.01 1", "0 0.995 0.5 0.02 0.5", "0 0.9 0.5 0.1 1.0000005", "0 0.9 0.5 0.2 1"
    ])
    convert_yolo(yolo, yolo / "out")
    boxes = [box for _, box in read(yolo / "out/train.json")["train/ä b.jpg"]]
    assert boxes == [[0, 0, 100, 60], [98.5, 15, 1.5, 30], [85, 0, 10, 60], [80, 0, 20, 60]]
    assert f"2 {CLIPPED}: ä b.jpg" in summary_of(capsys)


@pytest.mark.parametrize("image, label", [
    ("images/val/x.y.JPG", "labels/val/X.Y.txt"),
    ("images/val/x.y.jpg", "labels/val/x.y.TXT"),
    ("images/val/x.y.jpg", "images/val/x.y.txt"),
    ("images/val/x.y.jpg", "labels/Val/x.y.txt"),
    (f"images/val/{'й'}.jpg", f"labels/val/{unicodedata.normalize('NFD', 'й')}.txt"),
    (f"images/val/{unicodedata.normalize('NFD', 'é')}.jpg", f"labels/val/{'é'}.txt"),
])
def test_yolo_labels_are_found_by_a_name_that_is_nearly_right(yolo, image, label, capsys):
    (yolo / "images/val/x.y.jpg").rename(yolo / image)
    (yolo / label).parent.mkdir(exist_ok=True)
    save_list(yolo / label, ["0 0.2 0.5 0.2 0.333333"])
    save_list(yolo / "val.txt", [image])
    convert_yolo(yolo, yolo / "out")
    assert list(read(yolo / "out/val.json").values()) == [[("dog", [10, 20, 20, 20])]]
    assert f"1 label files {RENAMED}: {Path(label).name}" in summary_of(capsys)


def test_yolo_labels_of_another_image_are_not_taken(yolo, capsys):
    """x.y has none, and X.Y.txt is that of X.Y: it stays background."""
    save_image(yolo / "images/val/X.Y.jpg")
    save_list(yolo / "labels/val/X.Y.txt", ["0 0.2 0.5 0.2 0.333333"])
    save_list(yolo / "val.txt", ["images/val/x.y.jpg", "images/val/X.Y.jpg"])
    convert_yolo(yolo, yolo / "out")
    assert read(yolo / "out/val.json")["val/x.y.jpg"] == []
    assert "1 images without a label file, taken as background: x.y.jpg" in summary_of(capsys)


def test_yolo_files_that_are_not_used_are_counted(yolo, capsys):
    for name in ("images/extra/a.jpg", "images/extra/b.png"):
        save_image(yolo / name)
    (yolo / "labels/extra").mkdir()
    for name in ("labels/extra/a.txt", "labels/train/gone.txt", "images/val/c.heic"):
        (yolo / name).touch()
    with open(yolo / "data.yaml", "a") as file:
        file.write("minival: images/extra\n")
    convert_yolo(yolo, yolo / "out")
    lines = summary_of(capsys).split("files left out: ")[1].splitlines()
    assert lines[0] == "6" and sorted(lines[1:]) == [
        "  1 keys of data.yaml that are not train, val or test: minival",
        "  1 neither images nor labels: c.heic",
        "  1 text files without an image: gone.txt",
        "  3 in no split of data.yaml: a.jpg, b.png, a.txt",
    ]


@pytest.mark.parametrize("key", ["validation", "valid", "Val"])
def test_the_validation_split_has_several_names(yolo, key):
    text = (yolo / "data.yaml").read_text(encoding="utf-8")
    (yolo / "data.yaml").write_text(text.replace("val:", f"{key}:"))
    convert_yolo(yolo, yolo / "out")
    assert list(read(yolo / "out/val.json")) == ["val/x.y.jpg"]
    (yolo / "data.yaml").write_text(f"{text}\n{key}: images/val\n".replace("val:", "valid:", 1))
    if key != "valid":
        (yolo / "out").rename(yolo / "earlier")
        assert "are the same: keep one" in error_of(convert_yolo, yolo)


@pytest.mark.parametrize("links", [("images", "labels"), ("images",)])
def test_yolo_folders_may_be_links(yolo, links, capsys):
    """To folders elsewhere, whose labels are found there too; and to a folder around them."""
    elsewhere = yolo.parent / "store"
    save_image(elsewhere / "images/c.jpg")
    (elsewhere / "labels").mkdir()
    save_list(elsewhere / "labels/c.txt", ["0 0.2 0.5 0.2 0.333333"])
    for kind in links:
        (yolo / kind / "train/linked").symlink_to(elsewhere / kind)
        (yolo / kind / "train/loop").symlink_to(yolo / kind)
    convert_yolo(yolo, yolo / "out")
    found = read(yolo / "out/train.json")
    assert found["train/linked/c.jpg"] == [("dog", [10, 20, 20, 20])] and len(found) == 3
    assert f"{len(links)} neither images nor labels: loop" in summary_of(capsys)


@pytest.mark.parametrize("suffix", [".gif", ".jfif", ".JPE"])
@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_images_of_all_suffixes_are_converted(kind, suffix, request, capsys):
    root = request.getfixturevalue(kind)
    image = root / ("JPEGImages/x.y.jpg" if kind == "voc" else "images/train/ä b.jpg")
    image.rename(image.with_name(f"{image.stem}{suffix}"))
    (convert_voc if kind == "voc" else convert_yolo)(root, root / "out")
    images = [name for file in ("train", "val") for name in read(root / f"out/{file}.json")]
    assert len(images) == 3 and any(name.endswith(suffix) for name in images)
    assert summary_of(capsys).endswith("files left out: 0")
