"""Promises of tools/convert_dataset.py: every box where the annotation has it, every mistake named.

Boxes are compared with painted pixels (VOC) and with boxes written as shares (YOLO); files are read
back with pycocotools and Detectron2.
"""

import contextlib
import io
import json
import shlex

import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from projects.stageinteractor.data.formats.dataset import IMAGE_SUFFIXES, image_size
from projects.stageinteractor.data.formats.yolo import label_file
from tools import convert_dataset

WIDTH, HEIGHT = 100, 60
NAMES = ("ä b", "empty", "x.y")  # unicode, a space, a dot


# Lists of lists that would be 2^30 names if written out.
ALIASES = "\n".join(
    ["a0: &a0 [b, b]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30))]
)


def save_image(path, size=(WIDTH, HEIGHT), orientation=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)


def voc_object(name="dog", box=(11, 21, 30, 40), extra=""):
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box)
    inner = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
    return f"<object><name>{name}</name>{extra}<bndbox>{inner}</bndbox></object>"


def save_voc(root, stem, objects=(), size=(WIDTH, HEIGHT)):
    """One line for the head, one for each object, so that object i is in line i + 2."""
    head = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    lines = [f"<annotation><filename>other.jpg</filename>{head}", *objects, "</annotation>"]
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    (root / f"Annotations/{stem}.xml").write_text("\n".join(lines), encoding="utf-8")


def save_list(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def voc(tmp_path):
    """A VOC data set; its train split has no cat."""
    root = tmp_path / "VOC"
    for name in NAMES:
        save_image(root / f"JPEGImages/{name}.jpg")
    save_voc(root, "ä b", [voc_object(), voc_object("bird", (1, 1, WIDTH, HEIGHT))])
    save_voc(root, "empty")
    save_voc(root, "x.y", [voc_object("cat", (5, 5, 5, 5))])
    save_list(root / "train.txt", ["ä b", "", "empty"])
    save_list(root / "val.txt", ["x.y"])
    return root


@pytest.fixture
def yolo(tmp_path):
    """A YOLO data set with a folder and a list as splits; x.y has no label file."""
    root = tmp_path / "set of images"
    for path in ("train/ä b", "train/deep/empty", "val/x.y"):
        save_image(root / f"images/{path}.jpg")
    (root / "labels/train/deep").mkdir(parents=True)
    (root / "labels/val").mkdir()
    (root / "labels/train/deep/empty.txt").write_text("")
    save_list(root / "labels/train/ä b.txt", ["1 0.5 0.5 1 1", "0 0.2 0.5 0.2 0.333333"])
    save_list(root / "val.txt", ["./images/val/x.y.jpg"])
    save_list(
        root / "data.yaml",
        ["path: .", "train: images/train", "val: val.txt", "test:", "names: {0: dog, 1: big cat}"],
    )
    return root


def convert_voc(root, output, *options, splits=("train.txt", "val.txt")):
    arguments = ["voc", "--annotations", root / "Annotations", "--images", root / "JPEGImages"]
    if splits:
        arguments += ["--splits", *(root / split for split in splits)]
    convert_dataset.main([*map(str, arguments), "--output", str(output), *options])


def convert_yolo(root, output, *options):
    arguments = ["yolo", "--data", root / "data.yaml", "--output", output, *options]
    convert_dataset.main(list(map(str, arguments)))


def error_of(convert, root, *options, **splits):
    """What conversion refuses a data set with. It writes nothing."""
    output = root / "out"
    with pytest.raises(SystemExit) as error:
        convert(root, output, *options, **splits)
    assert not output.exists()
    return str(error.value)


def read(path):
    """{file name: [(class, box), ...]} of a COCO file."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    names = {i: category["name"] for i, category in coco.cats.items()}
    assert len({image["file_name"] for image in coco.imgs.values()}) == len(coco.imgs)
    return {
        image["file_name"]: [(names[a["category_id"]], a["bbox"]) for a in coco.imgToAnns[i]]
        for i, image in coco.imgs.items()
    }


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


def test_zero_based_voc_boxes_are_edges(tmp_path):
    save_image(tmp_path / "JPEGImages/a.png")
    boxes = (0, 0, WIDTH, HEIGHT), (10.5, 20, 30, 40.25)
    save_voc(tmp_path, "a", [voc_object(box=box) for box in boxes])
    assert "add --zero-based" in error_of(convert_voc, tmp_path, splits=())
    convert_voc(tmp_path, tmp_path / "out", "--zero-based", splits=())
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


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
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
    assert "1 images have no XML file and are left out" in capsys.readouterr().out


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


# Mistakes


def test_all_mistakes_in_voc_files_are_named_with_file_and_line(voc):
    save_voc(voc, "x.y", [
        voc_object(box=(5, 5, 4, 9)),
        voc_object(box=(5, 5, WIDTH + 1, 9)),
        voc_object(box=(5, "nan", 9, 9)),
        voc_object(box=(5, 5, 9)),
        voc_object(name=" "),
        voc_object(extra="<difficult>maybe</difficult>"),
        voc_object(),
    ])
    save_voc(voc, "no_image")
    (voc / "Annotations/broken.xml").write_text("<annotation>\n<object>\n</annotation>")
    (voc / "Annotations/html.xml").write_text("<html/>")
    (voc / "JPEGImages/empty.jpg").write_bytes(b"no image")
    save_list(voc / "val.txt", ["x.y", "no_image", "nowhere", "broken"])
    error = error_of(convert_voc, voc)
    for expected in (
        "x.y.xml:2: box 5 5 4 9 has no area",
        "x.y.xml:3: box 5 5 101 9 is not inside the image of 100 x 60 pixels",
        "x.y.xml:4: <ymin> is 'nan', not a number",
        "x.y.xml:5: <ymax> is missing",
        "x.y.xml:6: object without <name>",
        "x.y.xml:7: <difficult> is 'maybe': 0 or 1",
        "no_image.xml: needs one image named no_image.* in --images, found: none",
        "broken.xml:3: not XML (mismatched tag)",
        "html.xml:1: not VOC: <html> in place of <annotation>",
        "empty.xml: cannot be read as an image",
        "val.txt:3: no annotation ",
    ):
        assert expected in error
    assert "mistakes: 11\n" in error and "add --zero-based" not in error


def test_all_mistakes_in_yolo_files_are_named_with_file_and_line(yolo):
    save_list(yolo / "labels/train/ä b.txt", [
        "0 0.5 0.5 0.2",
        "",
        "0 0.5 0.5 0.2 0.2 0.9",
        "2 0.5 0.5 0.2 0.2",
        "-1 0.5 0.5 0.2 0.2",
        "0.5 0.5 0.5 0.2 0.2",
        "0 50 50 20 20",
        "0 0.5 0.5 0 0.2",
        "0 0.5 0.5 -0.2 0.2",
        "dog 0.5 0.5 0.2 0.2",
        "0 0.5 0.5 0.2 inf",
        "0 0.5 0.5 0.2 1.002",
        "0 0.5 0.5 0.2 0.2",
    ])
    save_list(yolo / "val.txt", ["images/val/x.y.jpg", "images/val/none.jpg"])
    (yolo / "labels/val/x.y.txt").write_bytes(b"\xff\xfe0")
    error = error_of(convert_yolo, yolo)
    for expected in (
        "ä b.txt:1: 4 values; expected",
        "ä b.txt:3: 6 values; expected",
        "ä b.txt:4: class 2, but data.yaml has 0 to 1",
        "ä b.txt:5: class -1,",
        "ä b.txt:6: class 0.5,",
        "ä b.txt:7: 0 50 50 20 20: not between 0 and 1",
        "ä b.txt:8: 0 0.5 0.5 0 0.2: the box has no area",
        "ä b.txt:9: 0 0.5 0.5 -0.2 0.2: not between 0 and 1",
        "ä b.txt:10: a value is 'dog', not a number",
        "ä b.txt:11: a value is 'inf', not a number",
        "ä b.txt:12: 0 0.5 0.5 0.2 1.002: not between 0 and 1",
        "val.txt:2: no image ",
        "x.y.jpg: x.y.txt is not text in UTF-8",
    ):
        assert expected in error
    assert "mistakes: 13\n" in error


def test_a_long_list_of_mistakes_is_cut_short(yolo):
    save_list(yolo / "labels/train/ä b.txt", ["7 0.5 0.5 0.2 0.2"] * 100)
    error = error_of(convert_yolo, yolo)
    assert error.count("class 7") == 20 and "and 80 more" in error


def test_mistakes_can_be_left_out_and_are_still_named(voc, capsys):
    save_voc(voc, "x.y", [voc_object(box=(5, 5, 4, 9)), voc_object("cat")])
    (voc / "JPEGImages/empty.jpg").unlink()
    convert_voc(voc, voc / "out", "--skip-mistakes")
    printed = capsys.readouterr().out
    assert "x.y.xml:2: box 5 5 4 9 has no area" in printed and "empty.xml: needs" in printed
    assert list(read(voc / "out/train.json")) == ["ä b.jpg"]
    assert read(voc / "out/val.json") == {"x.y.jpg": [("cat", [10, 20, 20, 20])]}


def test_a_split_that_mistakes_leave_empty_is_refused(voc):
    (voc / "JPEGImages/x.y.jpg").unlink()
    error = error_of(convert_voc, voc, "--skip-mistakes")
    assert "no image in split val" in error and "x.y.xml: needs one image" in error


@pytest.mark.parametrize(
    "entity",
    [
        "".join([
            '<!ENTITY l0 "ha">',
            *(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 30)),
        ]),
        '<!ENTITY l29 SYSTEM "file:///etc/hostname">',
    ],
    ids=["billion laughs", "external"],
)
def test_entities_are_refused(voc, entity):
    text = f"<!DOCTYPE a [\n{entity}]>\n<annotation>{voc_object('&l29;')}</annotation>"
    (voc / "Annotations/x.y.xml").write_text(text)
    assert "x.y.xml:2: declares the entity 'l" in error_of(convert_voc, voc)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("names: [a", "is not YAML"),
        ("train: images\nnames: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("- a", "`names` has to be"),
        ("train: images\nnames: {1: a, 2: b}", "`names` has to be"),
        ("train: images\nnames: [yes, no]", "`names` has to be"),
        ("train: images\nnames: []", "names: no classes"),
        ("train: images\nnames: [a, a]", "'a' is there twice"),
        ("train: images\nnames: [a]\nnc: 2", "nc is not 1, the number of `names`"),
        ("train: images\nnames: [a]\nkpt_shape: [17, 3]", "keypoints"),
        ("names: [a]", "none of train, val, test"),
        ("train: nowhere\nnames: [a, b]", "no folder and no .txt list of images"),
        ("path: [images]\ntrain: images\nnames: [a]", "`path` has to be the name of a folder"),
        ("train: 2017\nnames: [a]", "a split has to be a folder"),
        ("[" * 1000, "is not YAML"),
        (f"{ALIASES}\ntrain: *a29\nnames: [a]", "a split has to be a folder"),
        (f"{ALIASES}\ntrain: images\nnames: *a29", "`names` has to be"),
        ("path: nowhere\ntrain: images\nnames: [a, b]", "no folder and no .txt list of images"),
        ("train: images/val\nnames: [a]", "no labels at all: "),
        ("train: labels\nnames: [a]", "no image in split train"),
    ],
)
def test_mistakes_in_data_yaml(yolo, text, expected):
    (yolo / "data.yaml").write_text(text)
    assert expected in error_of(convert_yolo, yolo)


@pytest.mark.parametrize("encoding", ["gbk", "no such"])
def test_voc_files_in_encodings_that_cannot_be_read(voc, encoding):
    head = f'<?xml version="1.0" encoding="{encoding.replace(" ", "-")}"?>'
    (voc / "Annotations/x.y.xml").write_text(f"{head}\n<annotation/>")
    assert "x.y.xml: save it in UTF-8" in error_of(convert_voc, voc)


def test_voc_files_without_any_object_are_refused_with_the_reason(tmp_path):
    save_image(tmp_path / "JPEGImages/a.jpg")
    save_voc(tmp_path, "a")
    (tmp_path / "Annotations/b.xml").write_text("<html/>")
    error = error_of(convert_voc, tmp_path, "--skip-mistakes", splits=())
    assert "no object in any .xml" in error and "b.xml:1: not VOC" in error


def test_missing_files_are_named(tmp_path, voc):
    assert "no file " in error_of(convert_yolo, tmp_path)
    assert "no folder " in error_of(convert_voc, tmp_path, splits=())
    assert "nope.txt" in error_of(convert_voc, voc, splits=["nope.txt"])


def test_what_is_there_is_not_overwritten(voc):
    (voc / "out").mkdir()
    (voc / "out/val.json").write_text("mine")
    with pytest.raises(SystemExit, match="val.json exists already"):
        convert_voc(voc, voc / "out")
    assert [path.name for path in (voc / "out").iterdir()] == ["val.json"]
    assert (voc / "out/val.json").read_text() == "mine"


def test_splits_that_would_share_a_file_are_refused(voc):
    (voc / "other").mkdir()
    save_list(voc / "other/val.txt", ["x.y"])
    assert "same name" in error_of(convert_voc, voc, splits=["val.txt", "other/val.txt"])


def test_images_of_one_name_are_refused(voc):
    save_image(voc / "JPEGImages/x.y.png")
    assert "found: x.y.jpg, x.y.png" in error_of(convert_voc, voc)
