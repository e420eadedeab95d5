"""YOLO's annotations in Ultralytics' layout: data.yaml, and a text file for each image."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from tqdm import tqdm

from ...errors import UserError
from ..coco_file import Box
from ..file_names import NameIndex, files_below, with_suffix
from ..reading import IMAGE_SUFFIXES
from .conversion import (
    CLIPPED,
    RENAMED,
    Dataset,
    Mistake,
    Mistakes,
    checked_classes,
    clip,
    clipped_boxes,
    labelled_image,
    number,
    numbered_lines,
    unused_files,
)

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
ROUNDING = 1e-3  # of the image's side: YOLO files with three decimals are common


def read_data_yaml(path: Path) -> tuple[dict, list[str]]:
    """The content of data.yaml and the names of its classes. Raises UserError."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        data = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
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


def named_splits(data: dict, data_yaml: Path) -> dict[str, object]:
    """The entries of data.yaml for train, val and test, by these names. Raises UserError."""
    keys = {}
    for key in data:
        name = SPLITS.get(str(key).lower())
        if name and data[key]:
            if name in keys:
                raise UserError(f"{data_yaml}: `{keys[name]}` and `{key}` are the same: keep one")
            keys[name] = key
    if not keys:
        raise UserError(f"{data_yaml}: none of train, val, test")
    return {name: data[keys[name]] for name in dict.fromkeys(SPLITS.values()) if name in keys}


def split_images(
    parts: object, root: Path, data_yaml: Path, mistakes: Mistakes, lists: list[Path]
) -> Iterator[Path]:
    """Images of a split, which is a folder with those below, a .txt list, or several of these.

    The .txt lists are added to `lists`.
    """
    for part in parts if isinstance(parts, list) else [parts]:
        with mistakes.at(data_yaml):
            if not isinstance(part, str):  # not quoted below: it could be very long
                raise Mistake("a split has to be a folder, a .txt list or several of these")
            path = root / part
            if not path.exists() and part.startswith("../"):
                path = root / part[3:]  # Roboflow writes one ../ too many
            if path.is_dir():
                yield from with_suffix(files_below(path), IMAGE_SUFFIXES)
            elif path.is_file() and path.suffix == ".txt":
                lists.append(Path(os.path.abspath(path)))
                for line, name in numbered_lines(path):
                    with mistakes.at(path, line):
                        if not (path.parent / name).is_file():
                            raise Mistake(f"no image {path.parent / name}")
                        yield path.parent / name
            else:
                raise Mistake(f"no folder and no .txt list of images {path}; `path` is taken from "
                              "the folder of data.yaml if it is not absolute")


def label_file(image: Path) -> Path:
    """Where the boxes of an image belong: `labels` in place of the last folder `images`."""
    folders = list(image.parts[:-1])
    names = [folder.casefold() for folder in folders]
    if "images" in names:
        folders[len(names) - 1 - names[::-1].index("images")] = "labels"
    return Path(*folders, image.stem + ".txt")


def find_labels(images: Iterable[Path], files: Iterable[Path]) -> dict[Path, Path]:
    """The label file of each image that has one.

    If it is not where it belongs, or where the labels of the file behind a link belong, it is found
    among `files` by another spelling of its name, or beside the image.
    """
    images, found = list(images), {}
    for image in images:
        places = label_file(image), label_file(Path(os.path.realpath(image)))
        found.update((image, place) for place in places[::-1] if place.is_file())
    taken = set(found.values())
    others = NameIndex({path: str(path) for path in files if path not in taken})
    for image in images:
        if image not in found:
            places = label_file(image), image.with_name(f"{image.stem}.txt")
            similar = [others.find(str(place), any_folder=False) for place in places]
            found.update((image, paths[0]) for paths in similar[::-1] if len(paths) == 1)
    return found


def dataset_folders(images: Iterable[Path], root: Path) -> list[Path]:
    """Where files of the data set may be: one folder if it is below `root`, else those in use."""
    places = {place.parent for image in images for place in (image, label_file(image))}
    common = Path(os.path.commonpath(places))
    if root in (common, *common.parents):
        return [common]
    return sorted(place for place in places if place.is_dir() and not places & {*place.parents})


def yolo_box(row: str, num_classes: int, size: tuple[int, int]) -> Box:
    """A row of a label file as a box, clipped to the image. Raises Mistake if it is invalid."""
    values = [number(text, "a value") for text in row.split()]
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        raise Mistake(f"{len(values)} values; expected: class, centre x, centre y, width, height; "
                      "or: class, x and y of three or more corners")
    index, *places = values
    if index not in range(num_classes):
        raise Mistake(f"class {row.split()[0]}, but data.yaml has 0 to {num_classes - 1}")
    slack = [max(ROUNDING, 1 / side) for side in size] * (len(places) // 2)
    if any(not -over <= place <= 1 + over for place, over in zip(places, slack)):
        raise Mistake(f"{row[:60]}: not between 0 and 1, shares of the image's width and height")
    if len(places) == 4:
        x, y, w, h = places
        corners = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    else:
        xs, ys = places[0::2], places[1::2]
        corners = min(xs), min(ys), max(xs), max(ys)
    inside, outside = clip([value * side for value, side in zip(corners, size * 2)], size)
    # Rows have six decimals or fewer, so that less than a thousandth of a pixel is noise.
    x1, y1, x2, y2 = corners = tuple(round(value, 3) for value in inside)
    if x1 >= x2 or y1 >= y2:
        raise Mistake(f"{row[:60]}: the box has no area")
    return Box(int(index), corners, outside=outside)


def read_yolo(data_yaml: Path, mistakes: Mistakes) -> Dataset:
    """Read the data set that data.yaml describes.

    Args:
        data_yaml: Ultralytics' description of a data set.
        mistakes: receives what is wrong; such boxes and images are left out.

    Raises:
        UserError: data.yaml is invalid, or none of its splits or none of the labels is found.
    """
    data, classes = read_data_yaml(data_yaml)
    data_yaml = Path(os.path.abspath(data_yaml))
    root = data_yaml.parent / (data.get("path") or "")
    paths, lists = {}, []
    for name, parts in named_splits(data, data_yaml).items():
        found = split_images(parts, root, data_yaml, mistakes, lists)
        paths[name] = list(dict.fromkeys(Path(os.path.abspath(path)) for path in found))
    everything = list(dict.fromkeys(path for part in paths.values() for path in part))
    if not everything:
        return Dataset(classes, root, paths, {}, {})
    folders = dataset_folders(everything, data_yaml.parent)
    files = [path for folder in folders for path in files_below(folder)]
    texts = [path for path in with_suffix(files, {".txt"}) if path not in lists]
    label_of = find_labels(everything, texts)
    if not label_of:
        raise UserError(f"no labels at all: {label_file(everything[0])} is where the first belongs")

    labelled = {}
    for path in tqdm(everything, unit=" images", disable=None):
        with mistakes.at(path):
            image, labels = labelled_image(path), label_of.get(path)
            for line, row in numbered_lines(labels) if labels else []:
                with mistakes.at(labels, line):
                    size = image.width, image.height
                    image.boxes.append(yolo_box(row, len(classes), size))
            labelled[path] = image
    renamed = [labels for path, labels in label_of.items() if labels != label_file(path)]
    remarks = {
        CLIPPED: clipped_boxes(labelled.values()),
        f"label files {RENAMED}": renamed,
        "images without a label file, taken as background": [
            path for path in labelled if path not in label_of
        ],
    }

    images = with_suffix(files, IMAGE_SUFFIXES)
    theirs = {*images, *map(label_file, images)}

    def reason(path: Path) -> str:
        if path in theirs:
            return "in no split of data.yaml"
        return "text files without an image" if path in texts else "neither images nor labels"

    used = [data_yaml, *lists, *everything, *label_of.values()]
    unused = unused_files(files, used, reason)
    unused["keys of data.yaml that are not train, val or test"] = [
        Path(str(key)) for key, value in data.items()
        if isinstance(value, str) and value and os.path.exists(root / value)
        and str(key).lower() not in ("path", *SPLITS)
    ]
    splits = {name: [labelled[p] for p in part if p in labelled] for name, part in paths.items()}
    image_root = Path(os.path.commonpath([path.parent for path in everything]))
    return Dataset(classes, image_root, splits, remarks, unused)
