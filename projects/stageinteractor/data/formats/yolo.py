"""YOLO's annotations in Ultralytics' layout: data.yaml, and a text file an image."""

import os
from pathlib import Path
from typing import Iterator, List, Tuple

import yaml
from tqdm import tqdm

from ...errors import UserError
from .dataset import (
    IMAGE_SUFFIXES,
    Box,
    Dataset,
    LabelledImage,
    Mistake,
    Mistakes,
    checked_classes,
    find_files,
    image_size,
    number,
    numbered_lines,
    read_text,
)

SPLITS = ("train", "val", "test")
ROUNDING = 1e-3  # of the image's side: YOLO files with three decimals are common


def read_data_yaml(path: Path) -> Tuple[dict, List[str]]:
    """data.yaml and the names of its classes. Raises UserError."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        data = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError, Mistake) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    names = data.get("names") if isinstance(data, dict) else None
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not all(type(name) in (str, int) for name in names):
        raise UserError(
            f"{path}: `names` has to be a list of class names, or the names by number from 0; "
            "quote names such as 'no' or '1.5'"
        )
    if data.get("nc", len(names)) != len(names):
        raise UserError(f"{path}: nc is not {len(names)}, the number of `names`")
    if not isinstance(data.get("path", ""), (str, type(None))):
        raise UserError(f"{path}: `path` has to be the name of a folder")
    if "kpt_shape" in data:
        raise UserError(f"{path}: rows with keypoints (kpt_shape) are not converted")
    return data, checked_classes([str(name) for name in names], f"{path}: names")


def split_images(parts, data_yaml: Path, path_entry, mistakes: Mistakes) -> Iterator[Path]:
    """Images of a split: of a folder and all below, of a .txt list, or of a list of these."""
    root = data_yaml.parent / (path_entry or "")
    for part in parts if isinstance(parts, list) else [parts]:
        with mistakes.at(data_yaml):
            if not isinstance(part, str):  # anything else could be long beyond measure
                raise Mistake("a split has to be a folder, a .txt list or several of these")
            path = root / part
            if not path.exists() and part.startswith("../"):
                path = root / part[3:]  # Roboflow's files are one folder off
            if path.is_dir():
                yield from find_files(path, "**/*", IMAGE_SUFFIXES)
            elif path.is_file() and path.suffix == ".txt":
                for line, name in numbered_lines(path):
                    with mistakes.at(path, line):
                        if not (path.parent / name).is_file():
                            raise Mistake(f"no image {path.parent / name}")
                        yield path.parent / name
            else:
                raise Mistake(f"no folder and no .txt list of images {path}; `path` is taken from "
                              "the folder of data.yaml if it is not absolute")


def label_file(image: Path) -> Path:
    """Where the boxes of an image are: `labels` in place of the last folder `images`."""
    folders = list(image.parts[:-1])
    if "images" in folders:
        folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return Path(*folders, image.stem + ".txt")


def yolo_box(row: str, num_classes: int, size: Tuple[int, int]) -> Box:
    """A row of a label file as a box, clipped to the image. Raises Mistake."""
    values = [number(text, "a value") for text in row.split()]
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        raise Mistake(f"{len(values)} values; expected: class, centre x, centre y, width, height; "
                      "or: class, x and y of three or more corners")
    index, *places = values
    if index not in range(num_classes):
        raise Mistake(f"class {row.split()[0]}, but data.yaml has 0 to {num_classes - 1}")
    if min(places) < -ROUNDING or max(places) > 1 + ROUNDING:
        raise Mistake(f"{row[:60]}: not between 0 and 1, shares of the image's width and height")
    if len(places) == 4:
        x, y, w, h = places
        corners = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    else:
        xs, ys = places[0::2], places[1::2]
        corners = min(xs), min(ys), max(xs), max(ys)
    # Rows have six decimals or less: more than a thousandth of a pixel is noise.
    x1, y1, x2, y2 = corners = tuple(
        round(min(max(value, 0), 1) * side, 3) for value, side in zip(corners, size * 2)
    )
    if x1 >= x2 or y1 >= y2:
        raise Mistake(f"{row[:60]}: the box has no area")
    return Box(int(index), corners)


def read_yolo(data_yaml: Path, mistakes: Mistakes) -> Dataset:
    """The data set that data.yaml describes.

    Args:
        data_yaml: Ultralytics' description of a data set.
        mistakes: gets what is wrong; such boxes and images are left out.

    Raises:
        UserError: it is none, or no split or label of it can be found.
    """
    data, classes = read_data_yaml(data_yaml)
    paths = {}
    for name in SPLITS:
        if data.get(name):
            found = split_images(data[name], data_yaml, data.get("path"), mistakes)
            paths[name] = list(dict.fromkeys(Path(os.path.abspath(path)) for path in found))
    if not paths:
        raise UserError(f"{data_yaml}: none of {', '.join(SPLITS)}")
    everything = list(dict.fromkeys(path for part in paths.values() for path in part))
    if everything and not any(label_file(path).is_file() for path in everything):
        raise UserError(f"no labels at all: {label_file(everything[0])} is where the first belongs")
    labelled = {}
    for path in tqdm(everything, unit=" images", disable=None):
        with mistakes.at(path):
            size, labels, boxes = image_size(path), label_file(path), []
            rows = numbered_lines(labels) if labels.is_file() else []
            for line, row in rows:
                with mistakes.at(labels, line):
                    boxes.append(yolo_box(row, len(classes), size))
            labelled[path] = LabelledImage(path, *size, boxes)
    splits = {name: [labelled[p] for p in part if p in labelled] for name, part in paths.items()}
    image_root = Path(os.path.commonpath([p.parent for p in everything] or [data_yaml.parent]))
    return Dataset(classes, image_root, splits)
