"""All checks of a data set in COCO format, made in one pass before a run starts."""

import functools
import hashlib
import itertools
import math
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from .coco_file import (
    NAMES,
    Finding,
    brief,
    id_order,
    is_id,
    is_number,
    no_garbage_collection,
    read_coco,
    remark,
    valid_entries,
)
from .image_checks import check_images
from .numbered import object_area
from .object_checks import (
    check_boxes,
    check_duplicates,
    check_objects,
    check_segmentations,
)


class Split(NamedTuple):
    """Annotations in COCO's instance format, and the folder that file names are relative to."""

    json_file: str
    image_root: str


@no_garbage_collection()
def check_splits(splits: dict[str, Split]) -> list[Finding]:
    """Find what is wrong or remarkable in the splits of a data set and between them.

    Only the headers of image files are read.

    Args:
        splits: by name; all but "train" must be fit for evaluation.
    """
    findings, readable = [], []
    for name, split in splits.items():
        file = split.json_file
        coco, found = read_coco(file)
        findings += found
        if coco is None:
            continue
        tables, found = valid_entries(file, coco)
        if name != "train":
            findings += _check_evaluable(file, tables.annotations)
        same = next((other for other, _, _ in readable if os.path.samefile(file, other)), None)
        if same:
            what = f"the same file as {same}: evaluate on images that training does not see"
            findings.append(Finding("shared image", file, what))
            continue
        findings += found
        findings += _check_ids(file, coco)
        found, images = check_images(file, split.image_root, tables.images)
        findings += found
        findings += _check_references(file, coco, tables.annotations)
        findings += check_boxes(file, tables)
        findings += check_duplicates(file, tables)
        findings += check_segmentations(file, tables)
        findings += check_objects(file, coco, tables)
        findings += _check_categories(file, tables.categories)
        classes = {category["id"]: category["name"] for category in tables.categories}
        readable.append((file, classes, images))
    findings += _check_similar_names({file: classes for file, classes, _ in readable})
    digest = functools.cache(_digest)
    for (a, classes_a, images_a), (b, classes_b, images_b) in itertools.combinations(readable, 2):
        findings += _compare_classes(a, b, classes_a, classes_b)
        findings += _compare_images(a, b, images_a, images_b, digest)
    return findings


def describe(findings: list[Finding], limit: int = 10) -> str:
    """Findings as text by kind, mistakes first, with at most `limit` of each kind."""
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


def _ids(entries) -> dict[int, list[int]]:
    """The places of entries by their id. Entries without an id are left out."""
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


def _check_references(json_file, coco, annotations) -> Iterator[Finding]:
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        known = _ids(coco[table])
        for item in annotations:
            if item[key] not in known:
                what = f"{key} {brief.repr(item[key])} is not among the {table}"
                where = f"{json_file}: annotation {item['id']}"
                yield Finding(f"unknown {NAMES[table]}", where, what)


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
        yield remark("category ids", json_file, f"{what}the model numbers classes in this order")


def _check_similar_names(classes: dict[str, dict[int, str]]) -> Iterator[Finding]:
    """Remarks on names of classes that look alike, within a file and across files."""
    spellings = defaultdict(dict)  # file by name
    for file, names in classes.items():
        for name in names.values():
            folded = unicodedata.normalize("NFKC", name).casefold()
            key = "".join(c for c in folded if c.isprintable() and not c.isspace())
            spellings[key].setdefault(name, file)
    for names in spellings.values():
        if len(names) > 1:
            composed = {unicodedata.normalize("NFC", name) for name in names}
            show = brief.repr if len(composed) == len(names) else ascii
            what = f"{' and '.join(map(show, names))} differ only in case, blanks or Unicode form: "
            where = " and ".join(dict.fromkeys(names.values()))
            yield remark("similar class names", where, f"{what}are they one class?")


def _check_evaluable(json_file, annotations) -> Iterator[Finding]:
    """What COCO's evaluation needs and training does not."""
    lacking = [
        item["id"] for item in annotations
        if not is_number(item.get("area")) or "iscrowd" not in item
    ]
    if lacking:
        what = f"{len(lacking)} annotations lack iscrowd or area, which COCO's evaluation reads: "
        what += "set them to 0 and to width times height"
        yield Finding("not evaluable", f"{json_file}: annotation {lacking[0]}", what)
    wrong = [
        item for item in annotations
        if is_number(item.get("area")) and min(item["bbox"][2:]) > 0
        and not math.isclose(item["area"], object_area(item), rel_tol=0.01)
    ]
    if wrong:
        _, _, width, height = wrong[0]["bbox"]
        what = f"{len(wrong)} annotations have an area that cannot be that of an object in their "
        what += f"box, here {wrong[0]['area']:g} in {width:g} x {height:g}: to tell small objects "
        what += "from large ones, evaluation uses the area of the box instead"
        where = f"{json_file}: annotation {brief.repr(wrong[0]['id'])}"
        yield remark("area does not fit the box", where, what)


def _compare_classes(file_a, file_b, classes_a, classes_b) -> Iterator[Finding]:
    for key in sorted(classes_a.keys() | classes_b.keys(), key=id_order):
        a, b = (brief.repr(c[key]) if key in c else "missing" for c in (classes_a, classes_b))
        if a != b:
            where = f"{file_b}: category {brief.repr(key)}"
            yield Finding("different categories", where, f"{b} here, {a} in {file_a}")


def _compare_images(
    file_a, file_b, images_a, images_b, digest: Callable[[str], bytes]
) -> Iterator[Finding]:
    """Images that two splits share, by the same file or by the same content in two files."""
    sizes_a, sizes_b = ({path: os.path.getsize(path) for path in i} for i in (images_a, images_b))
    common = {*sizes_a.values()} & {*sizes_b.values()}
    contents = {digest(path): path for path, size in sizes_a.items() if size in common}
    same = {}
    for path, size in sizes_b.items():
        found = path if path in images_a else size in common and contents.get(digest(path))
        if found:
            same[path] = found
    if len(same) == len(images_b) > 1:
        what = f"all {len(same)} images are in {file_a} too: "
        what += "evaluate on images that training does not see"
        yield Finding("shared image", file_b, what)
        return
    for path, found in same.items():
        where = f"{file_b}: image {images_b[path]} {brief.repr(path)}"
        how = "the same file" if found == path else f"the same content as {brief.repr(found)}"
        yield Finding("shared image", where, f"{how}, image {images_a[found]} of {file_a}")


def _digest(path) -> bytes:
    try:
        return hashlib.sha256(Path(path).read_bytes()).digest()
    except OSError:  # check_images reports it
        return os.fsencode(path)
