"""Files in COCO's instance format: reading them, judging their entries, and writing them."""

import contextlib
import functools
import gc
import json
import os
import reprlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError


class Finding(NamedTuple):
    """A mistake, which stops training, or a remark, which is only worth knowing."""

    kind: str  # short and stable, such as "missing image"
    where: str  # the JSON file and the id, or the place in its list if there is no usable id
    what: str
    is_mistake: bool = True


class Tables(NamedTuple):
    """The entries of a COCO file that have all keys they need, each of the right type."""

    images: list[dict]
    annotations: list[dict]
    categories: list[dict]


class Box(NamedTuple):
    """An object in an image."""

    category: int  # index of the class, from 0
    corners: Sequence[float]  # x1, y1, x2, y2 in pixels: edges, from 0 to the image's size
    iscrowd: int = 0
    outside: float = 0  # pixels by which the box crossed the border before it was clipped


class LabelledImage(NamedTuple):
    """An image file and the objects in it."""

    path: Path
    width: int
    height: int
    boxes: list[Box]


remark = functools.partial(Finding, is_mistake=False)
NAMES = {"images": "image", "annotations": "annotation", "categories": "category"}
brief = reprlib.Repr()
brief.maxstring = 200  # does not shorten file names


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For functions that make millions of objects without cycles.

    Otherwise the collector looks at all of them again and again, which takes longer than making
    them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_tables(json_file: str, *, keep: bool = True) -> Tables:
    """The valid entries of a COCO file; empty tables if it cannot be read. See `read_coco`."""
    coco, _ = read_coco(json_file, keep=keep)
    return valid_entries(json_file, coco)[0] if coco else Tables([], [], [])


def require_tables(json_file: str, *, keep: bool = True, may_be_secret: bool = False) -> Tables:
    """The entries of a COCO file, see `read_coco`.

    Raises:
        UserError: the file cannot be read, or an entry is invalid.
    """
    coco, findings = read_coco(json_file, keep=keep, may_be_secret=may_be_secret)
    if coco:
        tables, findings = valid_entries(json_file, coco)
    if findings:
        raise UserError(f"{findings[0].where}: {findings[0].what}")
    return tables


_kept: dict[str, tuple[tuple, dict]] = {}  # by file: its inode, size and time; its content


@no_garbage_collection()
def read_coco(
    json_file, *, keep: bool = True, may_be_secret: bool = False
) -> tuple[dict | None, list[Finding]]:
    """The content of a COCO file with its three lists, or None and the reason.

    What was read is returned again as long as the file has not changed. Callers must not change it.

    Args:
        keep: whether others will ask for the same file. The content stays in memory until somebody
            asks without this.
        may_be_secret: accept a file without annotations, such as those of COCO's test sets.
    """
    stamp = _stamp(json_file)
    before, coco = _kept.pop(str(json_file), (None, None))
    if stamp is None or stamp != before:
        coco, findings = _parse_coco(json_file, may_be_secret)
        if coco is None:
            return coco, findings
    if keep and not may_be_secret:
        _kept[str(json_file)] = stamp, coco
    return coco, []


def _stamp(json_file) -> tuple | None:
    try:
        found = os.stat(json_file)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _parse_coco(json_file, may_be_secret) -> tuple[dict | None, list[Finding]]:
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
    except (OSError, RecursionError, ValueError) as error:  # permissions, nesting, endless digits
        return refuse("unreadable file", str(error))
    if isinstance(coco, dict):
        if may_be_secret:
            coco.setdefault("annotations", [])
        wrong = [f"no {key}" for key in NAMES if key not in coco]
        wrong += [f"{key} is not a list" for key in NAMES
                  if not isinstance(coco.get(key, []), list)]
        if wrong and "shapes" in coco:
            wrong.append("is it labelme's file of one image?")
    else:
        is_result = isinstance(coco, list) and coco and isinstance(coco[0], dict)
        wrong = ["a list: detections?" if is_result else "not a JSON object"]
    if wrong:
        needs = "a COCO file has lists of images, annotations and categories"
        return refuse("not COCO", f"{', '.join(wrong)}; {needs}")
    return coco, []


def is_whole(value) -> bool:
    """Whether a value is a whole number. Python counts true and false as such; JSON does not."""
    return type(value) is int


def is_id(value) -> bool:
    """Whether a value can be an id: a number of any size, or text."""
    return isinstance(value, str) or is_whole(value) or is_number(value)


def id_order(value) -> tuple:
    """A key to sort ids by: numbers before text, which Python does not compare."""
    return isinstance(value, str), value


def is_number(value) -> bool:
    """Whether a value is a finite number; true and false are not."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_text(value):
    return isinstance(value, str) and value.strip()


_ID = (is_id, "a number or text")
_SIZE = (lambda v: is_whole(v) and 0 < v < sys.maxsize, "a whole number of pixels above 0")
_TEXT = (_is_text, "text")
# Neither a log nor TensorBoard can write half of a surrogate pair.
_NAME = (lambda v: _is_text(v) and v.encode(errors="ignore").decode() == v, "text")
_BOX = (
    lambda v: isinstance(v, list) and len(v) == 4 and all(map(is_number, v)),
    "four finite numbers, [x, y, width, height] in pixels",
)
_REQUIRED = {
    "images": {"id": _ID, "file_name": _TEXT, "width": _SIZE, "height": _SIZE},
    "annotations": {"id": _ID, "image_id": _ID, "category_id": _ID, "bbox": _BOX},
    "categories": {"id": _ID, "name": _NAME},
}
_OPTIONAL = {
    "iscrowd": (lambda v: v in (0, 1), "0 or 1"),
    "ignore": (lambda v: v == 0, "0: COCO's evaluation disregards it, so remove the annotation"),
}


def valid_entries(json_file, coco: dict) -> tuple[Tables, list[Finding]]:
    """The entries that can be used, and what is wrong with the others."""
    kept, findings = {}, []
    for table, required in _REQUIRED.items():
        kept[table] = []
        rules = {**required, **_OPTIONAL} if table == "annotations" else required
        for index, entry in enumerate(coco[table]):
            if isinstance(entry, dict):
                wrong = [f"no {key}" for key in required if key not in entry]
                wrong += [
                    f"{key} is {brief.repr(entry[key])}, not {meaning}"
                    for key, (is_right, meaning) in rules.items()
                    if key in entry and not is_right(entry[key])
                ]
            else:
                wrong = [f"{brief.repr(entry)} is not a JSON object"]
            if not wrong:
                kept[table].append(entry)
                continue
            has_id = isinstance(entry, dict) and is_id(entry.get("id"))
            name = f"{NAMES[table]} {brief.repr(entry['id'])}" if has_id else f"{table}[{index}]"
            findings.append(Finding("broken entry", f"{json_file}: {name}", "; ".join(wrong)))
    return Tables(**kept), findings


def coco_annotation(
    number: int, image_id: int, category_id: int, corners: Sequence[float],
    *, iscrowd: int = 0, digits: int = 3, **more: Any,
) -> dict:
    """An annotation with a box, as COCO's instance format has it.

    Args:
        number: its id.
        corners: x1, y1, x2, y2 in pixels.
        digits: decimals to which the box and its area are rounded.
        more: further keys, such as ``score``.
    """
    x1, y1, x2, y2 = corners
    box = [round(value, digits) for value in (x1, y1, x2 - x1, y2 - y1)]
    return {
        "id": number, "image_id": image_id, "category_id": category_id, "bbox": box,
        "area": round(box[2] * box[3], digits), "iscrowd": iscrowd, **more,
    }


def to_coco(classes: Sequence[str], images: Iterable[LabelledImage], image_root: Path) -> dict:
    """The content of a COCO file. All ids count from 1, in the given order.

    Args:
        image_root: folder that the file names in it are relative to.
    """
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    coco = {"info": {}, "images": [], "annotations": [], "categories": categories}
    for image_id, image in enumerate(images, start=1):
        name = image.path.relative_to(image_root).as_posix()
        coco["images"].append(
            {"id": image_id, "file_name": name, "width": image.width, "height": image.height}
        )
        for box in image.boxes:
            coco["annotations"].append(coco_annotation(
                len(coco["annotations"]) + 1, image_id, box.category + 1, box.corners,
                iscrowd=box.iscrowd,
            ))
    return coco
