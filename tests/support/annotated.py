"""Small data sets in VOC's and YOLO's format, and their conversion."""

import contextlib
import io

import convert
import pytest
from PIL import Image
from pycocotools.coco import COCO

WIDTH, HEIGHT = 100, 60
NAMES = ("ä b", "empty", "x.y")  # unicode, a space, a dot


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


def make_voc(folder):
    """A VOC data set; its train split has no cat."""
    root = folder / "VOC"
    for name in NAMES:
        save_image(root / f"JPEGImages/{name}.jpg")
    save_voc(root, "ä b", [voc_object(), voc_object("bird", (1, 1, WIDTH, HEIGHT))])
    save_voc(root, "empty")
    save_voc(root, "x.y", [voc_object("cat", (5, 5, 5, 5))])
    save_list(root / "train.txt", ["ä b", "", "empty"])
    save_list(root / "val.txt", ["x.y"])
    return root


def make_yolo(folder):
    """A YOLO data set with a folder and a list as splits; x.y has no label file."""
    root = folder / "set of images"
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
    convert.main(["dataset", *map(str, arguments), "--output", str(output), *options])


def convert_yolo(root, output, *options):
    arguments = ["yolo", "--data", root / "data.yaml", "--output", output, *options]
    convert.main(["dataset", *map(str, arguments)])


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
