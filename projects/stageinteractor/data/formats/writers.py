"""Detections as data sets for labelling tools, in which a person corrects them."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote
from xml.etree import ElementTree as ET

import yaml
from tqdm import tqdm

from ...files import write_durably
from ..file_names import folded


class Labels(NamedTuple):
    """The objects of an image."""

    file: PurePosixPath  # of the image, below the folder of the data set
    size: tuple[int, int]  # width and height, pixels
    objects: list[tuple[int, tuple[float, ...], float]]  # class index; x, y, w, h; score


def yolo_files(classes: list[str], images: Iterable[Labels]) -> dict[str, str]:
    """Ultralytics' layout: data.yaml, and a text file for each image."""
    names = dict(enumerate(classes))
    files = {"data.yaml": yaml.safe_dump(
        {"train": FORMATS["yolo"].images, "names": names}, allow_unicode=True, sort_keys=False
    )}
    for image in images:
        rows = [
            (index, (x + w / 2) / image.size[0], (y + h / 2) / image.size[1],
             w / image.size[0], h / image.size[1])
            for index, (x, y, w, h), _ in image.objects
        ]
        path = PurePosixPath("labels", *image.file.parts[1:]).with_suffix(".txt")
        files[str(path)] = "".join("{} {:.7f} {:.7f} {:.7f} {:.7f}\n".format(*row) for row in rows)
    return files


def voc_files(classes: list[str], images: Iterable[Labels]) -> dict[str, str]:
    """Pascal VOC's layout: an XML file for each image. Pixels are counted from 1."""
    files = {}
    for image in images:
        root = ET.Element("annotation")
        ET.SubElement(root, "filename").text = image.file.name
        size = ET.SubElement(root, "size")
        for name, value in zip(("width", "height", "depth"), (*image.size, 3)):
            ET.SubElement(size, name).text = str(value)
        for index, (x, y, w, h), _ in image.objects:
            item = ET.SubElement(root, "object")
            ET.SubElement(item, "name").text = classes[index]
            box = ET.SubElement(item, "bndbox")
            for name, value in zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h)):
                ET.SubElement(box, name).text = f"{value:.2f}"
        ET.indent(root)
        files[f"Annotations/{image.file.stem}.xml"] = ET.tostring(root, "unicode") + "\n"
    return files


def label_studio_files(classes: list[str], images: Iterable[Labels]) -> dict[str, str]:
    """Label Studio's tasks with predictions, and the configuration of its labelling interface."""
    view = ET.Element("View")
    ET.SubElement(view, "Image", name="image", value="$image")
    labels = ET.SubElement(view, "RectangleLabels", name="label", toName="image")
    for name in classes:
        ET.SubElement(labels, "Label", value=name)
    tasks = []
    for image in images:
        width, height = image.size
        result = [
            {
                "type": "rectanglelabels", "from_name": "label", "to_name": "image",
                "original_width": width, "original_height": height, "image_rotation": 0,
                "score": score,
                "value": {
                    "x": 100 * x / width, "y": 100 * y / height, "width": 100 * w / width,
                    "height": 100 * h / height, "rotation": 0, "rectanglelabels": [classes[index]],
                },
            }
            for index, (x, y, w, h), score in image.objects
        ]
        address = f"/data/local-files/?d={quote(str(image.file))}"
        tasks.append({"data": {"image": address}, "predictions": [{"result": result}]})
    return {"tasks.json": json.dumps(tasks, indent=1), "labels.xml": ET.tostring(view, "unicode")}


class Format(NamedTuple):
    """A format of labelling tools."""

    images: str  # folder of the images, below that of the data set
    others: tuple[str, ...]  # what is written beside it
    files: Callable[[list[str], Iterable[Labels]], dict[str, str]]  # text of the others, by path


FORMATS = {
    "yolo": Format("images/train", ("labels/train", "data.yaml"), yolo_files),
    "voc": Format("JPEGImages", ("Annotations",), voc_files),
    "labelstudio": Format("images", ("tasks.json", "labels.xml"), label_studio_files),
}


def write_dataset(content: dict, form: str, folder: Path):
    """Write detections in one of `FORMATS`, with copies of their images.

    An image whose name is taken, apart from its suffix, gets a longer one. Boxes without area are
    left out, since nobody could correct them.

    Args:
        content: a COCO file with scores, whose ``file_name`` are paths of images.
        folder: of the data set; it must have nothing yet of what the format writes.

    Raises:
        OSError: a file cannot be written.
    """
    order = {category["id"]: index for index, category in enumerate(content["categories"])}
    objects = defaultdict(list)
    for item in content["annotations"]:
        if min(item["bbox"][2:]) > 0:
            found = order[item["category_id"]], item["bbox"], item["score"]
            objects[item["image_id"]].append(found)
    (folder / FORMATS[form].images).mkdir(parents=True)
    images, taken = [], set()
    for image in tqdm(content["images"], "copying", unit=" images", delay=1, disable=None):
        source = Path(image["file_name"])
        stem = source.stem
        while folded(stem) in taken:
            stem += "_"
        taken.add(folded(stem))
        file = PurePosixPath(FORMATS[form].images, stem + source.suffix)
        shutil.copyfile(source, folder / file)
        images.append(Labels(file, (image["width"], image["height"]), objects[image["id"]]))
    names = [category["name"] for category in content["categories"]]
    for name, text in FORMATS[form].files(names, images).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_durably(str(folder / name), lambda file, text=text: file.write(text.encode()))
