#!/usr/bin/env python
"""Convert Pascal VOC XML or YOLO text annotations to COCO JSON, the format that training reads.

    python tools/convert_dataset.py voc --annotations VOC/Annotations --images VOC/JPEGImages \\
        --splits VOC/ImageSets/Main/train.txt VOC/ImageSets/Main/val.txt --output OUT
    python tools/convert_dataset.py yolo --data data.yaml --output OUT

OUT gets one JSON file per split; images stay where they are. All mistakes are listed with file and
line, and nothing is written while there are any, unless --skip-mistakes leaves them out.

VOC: pixels count from 1 and xmax is the last one of the box; with --zero-based, xmin to ymax are
edges from 0, as LabelImg among others writes them. An image belongs to the XML file of the same
name, whatever <filename> says. Category ids follow the sorted class names of the whole annotation
folder, so they are the same for all splits. Difficult objects become iscrowd=1: neither a training
target nor counted in evaluation, the nearest that COCO has.

YOLO: Ultralytics' layout, with `path`, `train`, `val`, `test` and `names` in data.yaml; a category
id is the class index + 1. The labels of .../images/x.jpg are in .../labels/x.txt; an image without
that file has no objects. Polygons become their bounding boxes, boxes are clipped to the image.

No library does this: supervision 0.31 loses `difficult`, split lists and the places of mistakes,
globox 2.9 shifts VOC boxes by a pixel, datumaro 1.13 needs OpenCV, pandas and Pillow below 13.
"""

import argparse
import json
import math
import os
import shlex
import sys
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import yaml
from PIL import ExifTags, Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from projects.stageinteractor.errors import UserError

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SPLITS = ("train", "val", "test")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
ROUNDING = 1e-3  # of the image's side: YOLO files with three decimals are common
SHOWN = 20  # mistakes that are listed; the rest is counted


class Box(NamedTuple):
    category: int  # index of the class, from 0
    corners: Tuple[float, ...]  # x1, y1, x2, y2 in pixels: edges, from 0 to the image's size
    iscrowd: int = 0


class LabelledImage(NamedTuple):
    path: Path
    width: int
    height: int
    boxes: List[Box]


class Dataset(NamedTuple):
    classes: List[str]
    image_root: Path  # folder that file names in the JSON files are relative to
    splits: Dict[str, List[LabelledImage]]


class Mistake(UserError):
    """Something wrong in a person's files, at a line of the file where that is known."""

    def __init__(self, what: str, line: Optional[int] = None):
        super().__init__(what)
        self.line = line


class Mistakes(Dict[str, None]):
    """All that is wrong, each once and with its place; a set that keeps its order."""

    @contextmanager
    def at(self, path: Path, line: Optional[int] = None):
        """Record a Mistake that is raised in this block instead of ending with it."""
        try:
            yield
        except Mistake as error:
            line = error.line or line
            self[f"{path}:{line}: {error}" if line else f"{path}: {error}"] = None

    def __str__(self):
        rest = [f"and {len(self) - SHOWN} more"] if len(self) > SHOWN else []
        return "\n".join(f"  {line}" for line in [*self][:SHOWN] + rest)


def number(text: str, name: str) -> float:
    """A finite number. Raises Mistake for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise Mistake(f"{name} is {text!r}, not a number" if text else f"{name} is missing")
    return value


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. Raises Mistake."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Mistake(f"{path.name} is not text in UTF-8") from error


def numbered_lines(path: Path) -> List[Tuple[int, str]]:
    """Lines of a text file that are not blank, with their numbers from 1. Raises Mistake."""
    lines = enumerate(read_text(path).splitlines(), start=1)
    return [(n, line.strip()) for n, line in lines if line.strip()]


def find_files(folder: Path, pattern: str, suffixes: set) -> List[Path]:
    """Sorted files below a folder, without hidden ones. Raises UserError if it is missing."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    return sorted(
        path for path in folder.glob(pattern)
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )


def image_size(path: Path) -> Tuple[int, int]:
    """(width, height) as Detectron2 reads an image: turned as its EXIF data says. Raises Mistake.

    Only headers are read, but for PNG, which may have its EXIF data behind the pixels.
    """
    try:
        with Image.open(path) as image:
            # Pillow turns these itself, some versions only on loading; Detectron2 turns them back.
            if image.format == "TIFF":
                return image.tag_v2[256], image.tag_v2[257]
            width, height = image.size
            try:
                orientation = image.getexif().get(ExifTags.Base.Orientation)
            except Exception:  # whatever is wrong with it, Detectron2 reads on without
                orientation = None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise Mistake(f"cannot be read as an image ({error})") from error
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def checked_classes(names: List[str], source: str) -> List[str]:
    """Names of classes as they are. Raises UserError unless there are some, all different."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise UserError(f"{source}: " + (f"{twice[0]!r} is there twice" if twice else "no classes"))
    return names


# Pascal VOC


class LineElement(Element):
    line: int


def parse_voc(path: Path) -> LineElement:
    """The root of a VOC file; every element has its `line`.

    Raises Mistake if it is something else or declares entities, which could expand without end.
    """
    parser, builder = expat.ParserCreate(), TreeBuilder(element_factory=LineElement)

    def start(tag, attributes):
        builder.start(tag, attributes).line = parser.CurrentLineNumber

    def refuse(name, *_):
        raise Mistake(f"declares the entity {name!r}: not an annotation", parser.CurrentLineNumber)

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise Mistake(f"not XML ({expat.ErrorString(error.code)})", error.lineno) from error
    except (LookupError, ValueError) as error:
        raise Mistake(f"save it in UTF-8 ({error})") from error
    root = builder.close()
    if root.tag != "annotation":
        raise Mistake(f"not VOC: <{root.tag}> in place of <annotation>", root.line)
    return root


def text_in(element: Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def voc_classes(files: Iterable[Path], mistakes: Mistakes) -> List[str]:
    """Sorted names of the objects in VOC files."""
    names = set()
    for path in files:
        with mistakes.at(path):
            names |= {text_in(item, "name") for item in parse_voc(path).findall("object")}
    return sorted(names - {""})


def voc_box(item: Element, classes: List[str], size: Tuple[int, int], zero_based: bool) -> Box:
    """An object as a box. Raises Mistake where it is not one inside an image of that size."""
    name, difficult = text_in(item, "name"), text_in(item, "difficult")
    if name not in classes:
        raise Mistake(f"class {name!r} is not in --classes" if name else "object without <name>")
    if difficult not in ("", "0", "1"):
        raise Mistake(f"<difficult> is {difficult!r}: 0 or 1")
    written = [number(text_in(item, f"bndbox/{key}"), f"<{key}>") for key in CORNERS]
    corners = written if zero_based else [x - first for x, first in zip(written, (1, 1, 0, 0))]
    x1, y1, x2, y2 = corners
    place = "box " + " ".join(f"{value:g}" for value in written)
    if x1 >= x2 or y1 >= y2:
        raise Mistake(f"{place} has no area")
    if min(x1, y1) < 0 or x2 > size[0] or y2 > size[1]:
        hint = "; if this data set counts from 0, add --zero-based" if min(written) == 0 else ""
        raise Mistake(f"{place} is not inside the image of {size[0]} x {size[1]} pixels{hint}")
    return Box(classes.index(name), tuple(corners), int(difficult or 0))


def voc_image(file: Path, candidates: List[Path], root: Element) -> LabelledImage:
    """The image that a VOC file describes, without boxes. Raises Mistake."""
    if len(candidates) != 1:
        found = ", ".join(path.name for path in candidates) or "none"
        raise Mistake(f"needs one image named {file.stem}.* in --images, found: {found}")
    size = image_size(candidates[0])
    written = [text_in(root, f"size/{side}") for side in ("width", "height")]
    written = [number(text, "<size>") for text in written if text]
    if any(written) and written != [*size]:  # some tools leave it out or write zeros
        raise Mistake(
            f"<size> is {' x '.join(f'{side:g}' for side in written)}, but {candidates[0].name} "
            f"has {size[0]} x {size[1]} pixels when turned as its EXIF data says"
        )
    return LabelledImage(candidates[0], *size, [])


def read_voc(args, mistakes: Mistakes) -> Dataset:
    """The data set in VOC files. Raises UserError if files are missing altogether."""
    files = {path.stem: path for path in find_files(args.annotations, "*", {".xml"})}
    images = defaultdict(list)
    for path in find_files(args.images, "*", IMAGE_SUFFIXES):
        images[path.stem].append(path)
    splits = {path.stem: {} for path in args.splits}
    if len(splits) < len(args.splits):
        raise UserError("--splits: two files of the same name would become one JSON file")
    for path in args.splits:
        for line, stem in numbered_lines(path):
            with mistakes.at(path, line):
                if stem not in files:
                    raise Mistake(f"no annotation {args.annotations / stem}.xml")
                splits[path.stem][stem] = None
    if not splits:
        splits = {"all": files}
        if unused := len(images.keys() - files):
            print(f"{unused} images have no XML file and are left out")
    classes = args.classes
    if classes and len(classes) == 1 and classes[0].endswith(".txt"):
        classes = [name for _, name in numbered_lines(Path(classes[0]))]
    if args.classes:
        checked_classes(classes, "--classes")
    else:
        classes = voc_classes(files.values(), mistakes)
        if not classes:
            raise UserError(f"no object in any .xml of {args.annotations}\n{mistakes}".rstrip())

    labelled = {}
    wanted = set().union(*splits.values())
    for stem in tqdm([stem for stem in files if stem in wanted], unit=" images", disable=None):
        with mistakes.at(files[stem]):
            root = parse_voc(files[stem])
            labelled[stem] = image = voc_image(files[stem], images[stem], root)
            size = image.width, image.height
            for item in root.findall("object"):
                with mistakes.at(files[stem], item.line):
                    image.boxes.append(voc_box(item, classes, size, args.zero_based))
    splits = {
        name: [labelled[stem] for stem in part if stem in labelled] for name, part in splits.items()
    }
    return Dataset(classes, args.images, splits)


# YOLO


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


def read_yolo(args, mistakes: Mistakes) -> Dataset:
    """The data set that data.yaml describes. Raises UserError if no split of it can be found."""
    data, classes = read_data_yaml(args.data)
    paths = {}
    for name in SPLITS:
        if data.get(name):
            found = split_images(data[name], args.data, data.get("path"), mistakes)
            paths[name] = list(dict.fromkeys(Path(os.path.abspath(path)) for path in found))
    if not paths:
        raise UserError(f"{args.data}: none of {', '.join(SPLITS)}")
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
    image_root = Path(os.path.commonpath([p.parent for p in everything] or [args.data.parent]))
    return Dataset(classes, image_root, splits)


# COCO


def to_coco(classes: List[str], images: List[LabelledImage], image_root: Path) -> dict:
    """A split in COCO's instance format; boxes are [x, y, width, height] in pixels."""
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    coco = {"info": {}, "images": [], "annotations": [], "categories": categories}
    for image_id, image in enumerate(images, start=1):
        name = image.path.relative_to(image_root).as_posix()
        coco["images"].append(
            {"id": image_id, "file_name": name, "width": image.width, "height": image.height}
        )
        for box in image.boxes:
            x1, y1, x2, y2 = box.corners
            w, h = round(x2 - x1, 3), round(y2 - y1, 3)
            coco["annotations"].append({
                "id": len(coco["annotations"]) + 1,
                "image_id": image_id,
                "category_id": box.category + 1,
                "bbox": [x1, y1, w, h],
                "area": round(w * h, 3),
                "iscrowd": box.iscrowd,
            })
    return coco


def convert(args):
    """Convert a data set and say what came of it. Raises UserError, and then writes nothing."""
    mistakes = Mistakes()
    dataset = args.read(args, mistakes)
    if mistakes and not args.skip_mistakes:
        raise UserError(f"nothing was written, mistakes: {len(mistakes)}\n{mistakes}\n"
                        "Mend them, or leave these boxes and images out with --skip-mistakes")
    files = {name: args.output / f"{name}.json" for name in dataset.splits}
    for name, file in files.items():
        if not dataset.splits[name]:
            raise UserError(f"no image in split {name}\n{mistakes}".rstrip())
        if file.exists():
            raise UserError(f"{file} exists already: choose another --output")
    if mistakes:
        print(f"left out: {len(mistakes)}\n{mistakes}")
    args.output.mkdir(parents=True, exist_ok=True)
    for name, images in dataset.splits.items():
        text = json.dumps(to_coco(dataset.classes, images, dataset.image_root))
        with open(files[name], "x") as stream:
            stream.write(text)
        boxes = [box for image in images for box in image.boxes]
        empty, crowd = sum(not i.boxes for i in images), sum(box.iscrowd for box in boxes)
        difficult = f", {crowd} of them difficult" if crowd else ""
        print(f"{files[name]}: {len(images)} images, {empty} of them without objects; "
              f"{len(boxes)} boxes{difficult}; {len(dataset.classes)} classes")
    print(f"classes: {', '.join(dataset.classes)}")
    print(f"folder of the images: {dataset.image_root}")
    train, val = (files.get(name, f"{name.upper()}.json") for name in ("train", "val"))
    options = f"dataset.train={train}", f"dataset.val={val}", f"dataset.images={dataset.image_root}"
    print("next: python tools/train_net.py --config-file CONFIG", shlex.join(options))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="{voc,yolo}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--output", type=Path, required=True, help="folder for the JSON files")
    shared.add_argument("--skip-mistakes", action="store_true",
                        help="leave out what is wrong, box by box, and list it")
    voc = commands.add_parser("voc", parents=[shared], help="Pascal VOC XML")
    voc.add_argument("--annotations", type=Path, required=True, help="folder of XML files")
    voc.add_argument("--images", type=Path, required=True, help="folder of the images")
    voc.add_argument("--splits", type=Path, nargs="+", default=[], metavar="FILE",
                     help="a list of names each, one a line (default: all in one)")
    voc.add_argument("--classes", nargs="+", metavar="NAME",
                     help="names in order, or a .txt file with one a line (default: sorted)")
    voc.add_argument("--zero-based", action="store_true", help="xmin to ymax are edges from 0")
    voc.set_defaults(read=read_voc)
    yolo = commands.add_parser("yolo", parents=[shared], help="YOLO text, Ultralytics' layout")
    yolo.add_argument("--data", type=Path, required=True, metavar="FILE", help="data.yaml")
    yolo.set_defaults(read=read_yolo)
    args = parser.parse_args(argv)
    try:
        convert(args)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
