"""What can be wrong with a data set in COCO format, found in one pass before a run starts."""

import functools
import hashlib
import itertools
import json
import os
import reprlib
import sys
from collections import defaultdict
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from detectron2.structures import BoxMode
from PIL import Image

from .coco import MIN_IMAGE_SIDE, is_usable


class Split(NamedTuple):
    """Annotations in COCO's instance format, and the folder that their file names start at."""

    json_file: str
    image_root: str


class Finding(NamedTuple):
    """A mistake, which training refuses, or a remark, which is only worth knowing."""

    kind: str  # short and stable, as "missing image"
    where: str  # the JSON file and the id, or the line where there is no id yet
    what: str
    is_mistake: bool = True


class Tables(NamedTuple):
    """The entries of a COCO file that have all keys they need, each of the right type."""

    images: List[dict]
    annotations: List[dict]
    categories: List[dict]


_remark = functools.partial(Finding, is_mistake=False)
_NAMES = {"images": "image", "annotations": "annotation", "categories": "category"}
_EXIF_ORIENTATION, _EXIF_QUARTER_TURNS = 274, (5, 6, 7, 8)
_brief = reprlib.Repr()
_brief.maxstring = 200  # file names stay whole


def check_splits(splits: Dict[str, Split]) -> List[Finding]:
    """All that is wrong with or remarkable in the splits of a data set, each and between them.

    Image files are opened for their size, not decoded.

    Args:
        splits: by name; all but "train" are taken to be evaluated.
    """
    findings, readable = [], []
    for name, split in splits.items():
        file = split.json_file
        coco, found = _read_coco(file)
        findings += found
        if coco is None:
            continue
        tables, found = _sift(file, coco)
        findings += found
        findings += _check_ids(file, coco)
        found, images = _check_images(split, tables.images)
        findings += found
        findings += _check_references(file, coco, tables.annotations)
        findings += _check_boxes(file, tables)
        findings += _check_objects(file, coco, tables)
        findings += _check_categories(file, tables.categories)
        if name != "train":
            findings += _check_evaluable(file, tables.annotations)
        classes = {category["id"]: category["name"] for category in tables.categories}
        readable.append((file, classes, images))
    digest = functools.cache(_digest)
    for (a, classes_a, images_a), (b, classes_b, images_b) in itertools.combinations(readable, 2):
        findings += _compare_classes(a, b, classes_a, classes_b)
        findings += _compare_images(a, b, images_a, images_b, digest)
    return findings


def describe(findings: List[Finding], limit: int = 10) -> str:
    """Findings as text, mistakes first, by kind, with at most `limit` of each kind."""
    groups = defaultdict(list)
    for finding in sorted(findings, key=lambda finding: not finding.is_mistake):
        groups[finding.is_mistake, finding.kind].append(finding)
    lines = []
    for (is_mistake, kind), group in groups.items():
        lines.append(f"{'mistake' if is_mistake else 'remark'}: {kind} ({len(group)})")
        lines += [f"  {finding.where}: {finding.what}" for finding in group[:limit]]
        if len(group) > limit:
            lines.append(f"  ... and {len(group) - limit} more")
    return "\n".join(lines)


def read_tables(json_file: str) -> Tables:
    """The usable entries of a COCO file, none where it cannot be read."""
    coco, _ = _read_coco(json_file)
    return _sift(json_file, coco)[0] if coco else Tables([], [], [])


def training_objects(tables: Tables) -> Dict[int, List[dict]]:
    """The annotations that training learns from, by the id of their image."""
    images = {
        image["id"]: image for image in tables.images
        if min(image["width"], image["height"]) >= MIN_IMAGE_SIDE
    }
    objects = defaultdict(list)
    for item in tables.annotations:
        image = images.get(item["image_id"])
        box = {"bbox": item["bbox"], "bbox_mode": BoxMode.XYWH_ABS}
        if image and not item.get("iscrowd") and _is_loaded(item) and is_usable(box, image):
            objects[image["id"]].append(item)
    return dict(objects)


def _is_loaded(annotation):
    """Whether Detectron2 keeps an annotation: if it has polygons, one must have three points."""
    polygons = annotation.get("segmentation")
    if not polygons or isinstance(polygons, dict):
        return True
    return any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons)


def _read_coco(json_file) -> Tuple[Optional[dict], List[Finding]]:
    """The contents of a COCO file with its three lists, or None and the reason."""
    def refuse(kind, what, line=""):
        return None, [Finding(kind, f"{json_file}{line}", what)]

    if not os.path.isfile(json_file):
        return refuse("missing file", "is a folder" if os.path.isdir(json_file) else "no such file")
    try:
        text = Path(json_file).read_text(encoding="utf-8")
        if not text.strip():
            return refuse("empty file", "nothing in it: was it written to the end?")
        coco = json.loads(text)
    except json.JSONDecodeError as error:
        return refuse("not JSON", error.msg, f": line {error.lineno} column {error.colno}")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        return refuse("not JSON", "not UTF-8 text", f": line {line}")
    except (OSError, RecursionError, ValueError) as error:  # rights, nesting, endless digits
        return refuse("unreadable file", str(error))
    if isinstance(coco, dict):
        wrong = [f"no {key}" for key in _NAMES if key not in coco]
        wrong += [f"{key} is no list" for key in _NAMES if not isinstance(coco.get(key, []), list)]
        if wrong and "shapes" in coco:
            wrong.append("labelme's file of one image?")
    else:
        is_result = isinstance(coco, list) and coco and isinstance(coco[0], dict)
        wrong = ["a list: detections?" if is_result else "no object"]
    if wrong:
        needs = "it needs lists of images, annotations and categories"
        return refuse("not COCO", f"{', '.join(wrong)}: {needs}")
    return coco, []


def _is_whole(value):
    return type(value) is int  # to Python, true and false are whole numbers


def _is_number(value):
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _are_numbers(value):
    return isinstance(value, list) and all(map(_is_number, value))


def _is_segmentation(value):
    if isinstance(value, dict):
        return "counts" in value and isinstance(size := value.get("size"), list) and len(size) == 2
    return not value or isinstance(value, list) and all(isinstance(v, list) for v in value)


_WHOLE = (_is_whole, "a whole number")
_SIZE = (lambda v: _is_whole(v) and 0 < v < sys.maxsize, "a whole number of pixels above 0")
_TEXT = (lambda v: isinstance(v, str) and v.strip(), "text")
_BOX = (
    lambda v: _are_numbers(v) and len(v) == 4,
    "four finite numbers, [x, y, width, height] in pixels",
)
_REQUIRED = {
    "images": {"id": _WHOLE, "file_name": _TEXT, "width": _SIZE, "height": _SIZE},
    "annotations": {"id": _WHOLE, "image_id": _WHOLE, "category_id": _WHOLE, "bbox": _BOX},
    "categories": {"id": _WHOLE, "name": _TEXT},
}
# What Detectron2's loader stumbles over.
_OPTIONAL = {
    "iscrowd": (lambda v: v in (0, 1), "0 or 1"),
    "ignore": (lambda v: v == 0, "0: Detectron2 loads no other, leave the annotation out"),
    "segmentation": (_is_segmentation, "a list of polygons or a run-length encoding"),
    "keypoints": (lambda v: not v or _are_numbers(v), "a list of numbers"),
}


def _sift(json_file, coco) -> Tuple[Tables, List[Finding]]:
    """The entries that can be used, and what is wrong with the others."""
    kept, findings = {}, []
    for table, required in _REQUIRED.items():
        kept[table] = []
        rules = {**required, **_OPTIONAL} if table == "annotations" else required
        for index, entry in enumerate(coco[table]):
            if isinstance(entry, dict):
                wrong = [f"no {key}" for key in required if key not in entry]
                wrong += [
                    f"{key} is {_brief.repr(entry[key])}, not {meaning}"
                    for key, (is_right, meaning) in rules.items()
                    if key in entry and not is_right(entry[key])
                ]
            else:
                wrong = [f"{_brief.repr(entry)} is no object"]
            if not wrong:
                kept[table].append(entry)
                continue
            has_id = isinstance(entry, dict) and _is_whole(entry.get("id"))
            name = f"{_NAMES[table]} {entry['id']}" if has_id else f"{table}[{index}]"
            findings.append(Finding("broken entry", f"{json_file}: {name}", "; ".join(wrong)))
    return Tables(**kept), findings


def _ids(entries) -> Dict[int, List[int]]:
    """Places of the entries that have an id, by it, whatever else they lack."""
    places = defaultdict(list)
    for index, entry in enumerate(entries):
        if isinstance(entry, dict) and _is_whole(entry.get("id")):
            places[entry["id"]].append(index)
    return places


def _check_ids(json_file, coco) -> Iterator[Finding]:
    for table, name in _NAMES.items():
        for entry_id, places in _ids(coco[table]).items():
            if len(places) > 1:
                what = f"{len(places)} have this id: "
                what += ", ".join(f"{table}[{index}]" for index in places[:5])
                what += ", ..." if len(places) > 5 else ""
                yield Finding(f"duplicate {name} id", f"{json_file}: {name} {entry_id}", what)


def _check_images(split, images) -> Tuple[List[Finding], Dict[str, int]]:
    """Findings on the image files, and the id of the image in each file that is there."""
    missing, findings, files = [], [], {}
    for image in images:
        name = _brief.repr(image["file_name"])
        where = f"{split.json_file}: image {image['id']} {name}"
        path = os.path.join(split.image_root, image["file_name"])
        if not os.path.isfile(path):
            what = f"{_brief.repr(path)} is {'a folder' if os.path.isdir(path) else 'not there'}"
            missing.append(Finding("missing image", where, what))
            continue
        path = os.path.realpath(path)
        if path in files:
            what = f"image {files[path]} has the same file"
            findings.append(Finding("duplicate file name", where, what))
        else:
            files[path] = image["id"]
            findings += _check_file(path, image, where)
    if len(missing) == len(images) > 1:
        what = f"{missing[0].what}, nor is any other of the {len(images)} images: "
        what += f"is {_brief.repr(split.image_root)} their folder?"
        missing = [missing[0]._replace(what=what)]
    return missing + findings, files


def _check_file(path, image, where) -> Iterator[Finding]:
    try:
        with Image.open(path) as file:
            size, mode = file.size, file.mode
            try:
                # Not PNG's own method, which decodes the image to look for tags behind it.
                orientation = Image.Image.getexif(file).get(_EXIF_ORIENTATION)
            except Exception:  # Detectron2 does without broken tags, too
                orientation = None
    except Exception as error:  # Pillow's readers raise all sorts
        reason = "no image that Pillow can read" if "identify" in str(error) else str(error)
        yield Finding("unreadable image", where, reason)
        return
    expected = image["width"], image["height"]
    turned = size[::-1] if orientation in _EXIF_QUARTER_TURNS else size
    if turned != expected:
        what = "{} x {} in the JSON, ".format(*expected) + "{} x {} in the file".format(*turned)
        if turned == expected[::-1] and turned != size:
            what += " as training reads it, rotated by EXIF: remove the tag or turn the boxes"
        elif turned == expected[::-1]:
            what += ": width and height are swapped"
        yield Finding("size mismatch", where, what)
    if min(turned) < MIN_IMAGE_SIDE:
        what = "{} x {} pixels: training leaves out images ".format(*turned)
        yield _remark("small image", where, f"{what}with a side below {MIN_IMAGE_SIDE}")
    if mode.startswith(("I", "F")):
        what = f"mode {mode}: training clips values above 255, scale them to 8 bits"
        yield _remark("more than 8 bits", where, what)


def _check_references(json_file, coco, annotations) -> Iterator[Finding]:
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        known = _ids(coco[table])
        for item in annotations:
            if item[key] not in known:
                what = f"{key} {item[key]} is not among the {table}"
                where = f"{json_file}: annotation {item['id']}"
                yield Finding(f"unknown {_NAMES[table]}", where, what)


def _check_boxes(json_file, tables) -> Iterator[Finding]:
    images = {image["id"]: image for image in tables.images}
    crossing, are_corners = 0, True
    for item in tables.annotations:
        where = f"{json_file}: annotation {item['id']}"
        if not _is_loaded(item):
            what = "no polygon of its segmentation has three points: Detectron2 leaves it out"
            yield _remark("polygon without area", where, what)
        image = images.get(item["image_id"])
        if image is None:
            continue
        x, y, w, h = map(float, item["bbox"])
        width, height = image["width"], image["height"]
        box = f"[{x:g}, {y:g}, {w:g}, {h:g}]"
        place = f"the {width} x {height} pixels of image {image['id']}"
        beyond = max(-x, -y, x + w - width, y + h - height)
        crossing += beyond > 1
        are_corners = are_corners and x < w <= width + 1 and y < h <= height + 1
        if w <= 0 or h <= 0:
            what = f"{box} has no area: bbox is [x, y, width, height]"
            yield Finding("box without area", where, what)
        elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
            yield Finding("box outside", where, f"{box} is outside {place}")
        elif not is_usable({"bbox": [x, y, w, h], "bbox_mode": BoxMode.XYWH_ABS}, image):
            what = f"{box} is below a pixel wide or high: training leaves it out"
            yield _remark("tiny box", where, what)
        elif beyond > 1:
            what = f"{box} reaches {beyond:g} pixels beyond {place}: training clips it"
            yield _remark("box over the edge", where, what)
    if crossing and are_corners:
        what = "all boxes would fit as [x1, y1, x2, y2]; COCO has [x, y, width, height]"
        yield _remark("corners", json_file, what)


def _check_objects(json_file, coco, tables) -> Iterator[Finding]:
    """What there is to learn from, and what there is not."""
    for table in _NAMES:
        if not coco[table]:
            yield Finding("empty split", json_file, f"no {table}")
    objects = training_objects(tables)
    if coco["images"] and coco["annotations"] and not objects:
        what = f"none of the {len(coco['annotations'])} annotations is an object of a pixel or "
        what += f"more in an image with sides of {MIN_IMAGE_SIDE} pixels or more"
        yield Finding("empty split", json_file, what)
    empty = [image["id"] for image in tables.images if image["id"] not in objects]
    if empty:
        what = f"{len(empty)} of {len(coco['images'])} have no object to learn from, the first is "
        what += f"image {empty[0]}: training drops them unless dataset.keep_empty=true"
        yield _remark("images without objects", json_file, what)
    learned = {item["category_id"] for items in objects.values() for item in items}
    unused = [c["name"] for c in tables.categories if c["id"] not in learned]
    if unused:
        what = f"{len(unused)} of {len(coco['categories'])} have no object to learn from: "
        yield _remark("classes without objects", json_file, what + _brief.repr(unused)[1:-1])
    crowds = [item["id"] for item in tables.annotations if item.get("iscrowd")]
    if crowds:
        what = f"{len(crowds)} with iscrowd are nothing to learn and nothing to miss, "
        yield _remark("crowds", json_file, f"{what}the first is annotation {crowds[0]}")


def _check_categories(json_file, categories) -> Iterator[Finding]:
    first = {}
    for category in categories:
        same = first.setdefault(category["name"], category["id"])
        if same != category["id"]:
            what = f"{_brief.repr(category['name'])} is the name of category {same} too"
            where = f"{json_file}: category {category['id']}"
            yield Finding("duplicate category name", where, what)
    ids = sorted({category["id"] for category in categories})
    if ids != list(range(1, len(ids) + 1)):
        what = f"{ids[0]} to {ids[-1]} for {len(ids)} classes, not 1 to {len(ids)}: "
        yield _remark("category ids", json_file, f"{what}classes are numbered in this order")


def _check_evaluable(json_file, annotations) -> Iterator[Finding]:
    """What COCO's evaluation relies on and training does not."""
    lacking = [
        item["id"] for item in annotations
        if not _is_number(item.get("area")) or "iscrowd" not in item
    ]
    if lacking:
        what = f"{len(lacking)} annotations lack iscrowd or area, which COCO's evaluation reads: "
        what += "write 0 and width times height"
        yield Finding("not evaluable", f"{json_file}: annotation {lacking[0]}", what)
    if any(item["id"] == 0 for item in annotations):
        what = "COCO's evaluation takes what finds it for a false alarm: count ids from 1"
        yield _remark("annotation id 0", f"{json_file}: annotation 0", what)


def _compare_classes(file_a, file_b, classes_a, classes_b) -> Iterator[Finding]:
    for key in sorted(classes_a.keys() | classes_b.keys()):
        a, b = (_brief.repr(c[key]) if key in c else "missing" for c in (classes_a, classes_b))
        if a != b:
            where = f"{file_b}: category {key}"
            yield Finding("different categories", where, f"{b} here, {a} in {file_a}")


def _compare_images(
    file_a, file_b, images_a, images_b, digest: Callable[[str], bytes]
) -> Iterator[Finding]:
    """Images that two splits share: the same file, or the same content in two files."""
    sizes_a, sizes_b = ({path: os.path.getsize(path) for path in i} for i in (images_a, images_b))
    common = {*sizes_a.values()} & {*sizes_b.values()}
    contents = {digest(path): path for path, size in sizes_a.items() if size in common}
    for path, size in sizes_b.items():
        same = path if path in images_a else size in common and contents.get(digest(path))
        if same:
            where = f"{file_b}: image {images_b[path]} {_brief.repr(path)}"
            how = "the same file" if same == path else f"the same content as {_brief.repr(same)}"
            yield Finding("shared image", where, f"{how}, image {images_a[same]} of {file_a}")


def _digest(path) -> bytes:
    try:
        return hashlib.sha256(Path(path).read_bytes()).digest()
    except OSError:  # reported as unreadable already
        return os.fsencode(path)
