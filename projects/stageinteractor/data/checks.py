"""What can be wrong with a data set in COCO format, found in one pass before a run starts."""

import functools
import hashlib
import itertools
import math
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

from detectron2.structures import BoxMode
from PIL import Image

from .coco import MIN_IMAGE_SIDE, is_usable
from .coco_file import (
    NAMES,
    Finding,
    Tables,
    brief,
    id_order,
    is_id,
    is_number,
    read_coco,
    sift,
)
from .numbered import object_area
from .reading import open_image, reason_of


class Split(NamedTuple):
    """Annotations in COCO's instance format, and the folder that their file names start at."""

    json_file: str
    image_root: str


MAX_DETECTIONS = 100  # of an image, that COCO's evaluation counts
_remark = functools.partial(Finding, is_mistake=False)
_EXIF_ORIENTATION, _EXIF_QUARTER_TURNS = 274, (5, 6, 7, 8)


def check_splits(splits: Dict[str, Split]) -> List[Finding]:
    """All that is wrong with or remarkable in the splits of a data set, each and between them.

    Image files are opened for their size, not decoded.

    Args:
        splits: by name; all but "train" are taken to be evaluated.
    """
    findings, readable = [], []
    for name, split in splits.items():
        file = split.json_file
        coco, found = read_coco(file)
        findings += found
        if coco is None:
            continue
        tables, found = sift(file, coco)
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


def _ids(entries) -> Dict[int, List[int]]:
    """Places of the entries that have an id, by it, whatever else they lack."""
    places = defaultdict(list)
    for index, entry in enumerate(entries):
        if isinstance(entry, dict) and is_id(entry.get("id")):
            places[entry["id"]].append(index)
    return places


def _check_ids(json_file, coco) -> Iterator[Finding]:
    for table, name in NAMES.items():
        for entry_id, places in _ids(coco[table]).items():
            if len(places) > 1:
                what = f"{len(places)} have this id: "
                what += ", ".join(f"{table}[{index}]" for index in places[:5])
                what += ", ..." if len(places) > 5 else ""
                where = f"{json_file}: {name} {brief.repr(entry_id)}"
                yield Finding(f"duplicate {name} id", where, what)


def _check_images(split, images) -> Tuple[List[Finding], Dict[str, int]]:
    """Findings on the image files, and the id of the image in each file that is there."""
    missing, findings, files = [], [], {}
    for image in images:
        name = brief.repr(image["file_name"])
        where = f"{split.json_file}: image {image['id']} {name}"
        path = os.path.join(split.image_root, image["file_name"])
        if not os.path.isfile(path):
            what = f"{brief.repr(path)} is {'a folder' if os.path.isdir(path) else 'not there'}"
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
        what += f"is {brief.repr(split.image_root)} their folder?"
        missing = [missing[0]._replace(what=what)]
    return missing + findings, files


def _check_file(path, image, where) -> Iterator[Finding]:
    try:
        with open_image(path) as file:
            size, mode = file.size, file.mode
            if file.format == "TIFF":  # whose size some versions of Pillow turn already
                size = file.tag_v2[256], file.tag_v2[257]
            try:
                # Not PNG's own method, which decodes the image to look for tags behind it.
                orientation = Image.Image.getexif(file).get(_EXIF_ORIENTATION)
            except Exception:  # Detectron2 does without broken tags, too
                orientation = None
    except Exception as error:  # Pillow's readers raise all sorts
        yield Finding("unreadable image", where, reason_of(error))
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
        what = "of 16 bits, the upper 8 are read: 0 to 65535 as 0 to 255"
        if mode == "F":
            what = "floating point is read as 0 to 255, and refused if it has other values"
        yield _remark("more than 8 bits", where, what)


def _check_references(json_file, coco, annotations) -> Iterator[Finding]:
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        known = _ids(coco[table])
        for item in annotations:
            if item[key] not in known:
                what = f"{key} {brief.repr(item[key])} is not among the {table}"
                where = f"{json_file}: annotation {item['id']}"
                yield Finding(f"unknown {NAMES[table]}", where, what)


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
    for table in NAMES:
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
        yield _remark("classes without objects", json_file, what + brief.repr(unused)[1:-1])
    crowds = [item["id"] for item in tables.annotations if item.get("iscrowd")]
    if crowds:
        what = f"{len(crowds)} with iscrowd are nothing to learn and nothing to miss, "
        yield _remark("crowds", json_file, f"{what}the first is annotation {crowds[0]}")


def _check_categories(json_file, categories) -> Iterator[Finding]:
    first = {}
    for category in categories:
        same = first.setdefault(category["name"], category["id"])
        if same != category["id"]:
            what = f"{brief.repr(category['name'])} is the name of category {same} too"
            where = f"{json_file}: category {category['id']}"
            yield Finding("duplicate category name", where, what)
    ids = sorted({category["id"] for category in categories}, key=id_order)
    if ids != list(range(1, len(ids) + 1)):
        first, last = brief.repr(ids[0]), brief.repr(ids[-1])
        what = f"{first} to {last} for {len(ids)} classes, not 1 to {len(ids)}: "
        yield _remark("category ids", json_file, f"{what}classes are numbered in this order")


def _check_evaluable(json_file, annotations) -> Iterator[Finding]:
    """What COCO's evaluation relies on and training does not."""
    lacking = [
        item["id"] for item in annotations
        if not is_number(item.get("area")) or "iscrowd" not in item
    ]
    if lacking:
        what = f"{len(lacking)} annotations lack iscrowd or area, which COCO's evaluation reads: "
        what += "write 0 and width times height"
        yield Finding("not evaluable", f"{json_file}: annotation {lacking[0]}", what)
    wrong = [
        item for item in annotations
        if is_number(item.get("area")) and min(item["bbox"][2:]) > 0
        and not math.isclose(item["area"], object_area(item), rel_tol=0.01)
    ]
    if wrong:
        _, _, width, height = wrong[0]["bbox"]
        what = f"{len(wrong)} annotations have an area that cannot be that of an object in their "
        what += f"box, here {wrong[0]['area']:g} in {width:g} x {height:g}: the evaluation takes "
        what += "the area of the box, to tell small objects from large ones"
        where = f"{json_file}: annotation {brief.repr(wrong[0]['id'])}"
        yield _remark("area does not fit the box", where, what)
    counts = Counter(item["image_id"] for item in annotations if not item.get("iscrowd"))
    crowded = [count for _, count in counts.most_common() if count > MAX_DETECTIONS]
    if crowded:
        image_id = brief.repr(counts.most_common(1)[0][0])
        what = f"{len(crowded)} images have more than {MAX_DETECTIONS} objects, this one "
        what += f"{crowded[0]}: COCO counts {MAX_DETECTIONS} detections, so the others are missed "
        what += f"unless dataloader.evaluator.max_dets_per_image={crowded[0]}"
        yield _remark("more objects than detections", f"{json_file}: image {image_id}", what)


def _compare_classes(file_a, file_b, classes_a, classes_b) -> Iterator[Finding]:
    for key in sorted(classes_a.keys() | classes_b.keys(), key=id_order):
        a, b = (brief.repr(c[key]) if key in c else "missing" for c in (classes_a, classes_b))
        if a != b:
            where = f"{file_b}: category {brief.repr(key)}"
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
            where = f"{file_b}: image {images_b[path]} {brief.repr(path)}"
            how = "the same file" if same == path else f"the same content as {brief.repr(same)}"
            yield Finding("shared image", where, f"{how}, image {images_a[same]} of {file_a}")


def _digest(path) -> bytes:
    try:
        return hashlib.sha256(Path(path).read_bytes()).digest()
    except OSError:  # reported as unreadable already
        return os.fsencode(path)
