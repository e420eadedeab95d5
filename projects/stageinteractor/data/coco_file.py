"""A file in COCO's instance format: what can be read of it, and what cannot."""

import functools
import json
import os
import reprlib
import sys
from pathlib import Path
from typing import NamedTuple


class Finding(NamedTuple):
    """A mistake, which training refuses, or a remark, which is only worth knowing."""

    kind: str  # short and stable, as "missing image"
    where: str  # the JSON file and the id, or the line where there is no id yet
    what: str
    is_mistake: bool = True


class Tables(NamedTuple):
    """The entries of a COCO file that have all keys they need, each of the right type."""

    images: list[dict]
    annotations: list[dict]
    categories: list[dict]


remark = functools.partial(Finding, is_mistake=False)
NAMES = {"images": "image", "annotations": "annotation", "categories": "category"}
brief = reprlib.Repr()
brief.maxstring = 200  # file names stay whole


def read_tables(json_file: str, *, keep: bool = True) -> Tables:
    """The usable entries of a COCO file, none where it cannot be read. ``keep``: `read_coco`'s."""
    coco, _ = read_coco(json_file, keep=keep)
    return sift(json_file, coco)[0] if coco else Tables([], [], [])


_kept: dict[str, tuple[tuple, dict]] = {}  # by file: its inode, size and time; its content


def read_coco(json_file, *, keep: bool = True) -> tuple[dict | None, list[Finding]]:
    """The contents of a COCO file with its three lists, or None and the reason.

    A file is parsed once, unless it has changed. Nobody may change what is returned.

    Args:
        keep: whether others will ask for the same file; what was parsed stays in memory until
            somebody asks without.
    """
    stamp = _stamp(json_file)
    before, coco = _kept.pop(str(json_file), (None, None))
    if stamp is None or stamp != before:
        coco, findings = _parse_coco(json_file)
        if coco is None:
            return coco, findings
    if keep:
        _kept[str(json_file)] = stamp, coco
    return coco, []


def _stamp(json_file) -> tuple | None:
    try:
        found = os.stat(json_file)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _parse_coco(json_file) -> tuple[dict | None, list[Finding]]:
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
        wrong = [f"no {key}" for key in NAMES if key not in coco]
        wrong += [f"{key} is no list" for key in NAMES if not isinstance(coco.get(key, []), list)]
        if wrong and "shapes" in coco:
            wrong.append("labelme's file of one image?")
    else:
        is_result = isinstance(coco, list) and coco and isinstance(coco[0], dict)
        wrong = ["a list: detections?" if is_result else "no object"]
    if wrong:
        needs = "it needs lists of images, annotations and categories"
        return refuse("not COCO", f"{', '.join(wrong)}: {needs}")
    return coco, []


def is_whole(value) -> bool:
    """Whether it is a whole number, which true and false are to Python."""
    return type(value) is int


def is_id(value) -> bool:
    """Whether it can be an id: a number of any size or a text."""
    return isinstance(value, str) or is_whole(value) or is_number(value)


def id_order(value) -> tuple:
    """A key to sort ids by: numbers before texts, which Python does not compare."""
    return isinstance(value, str), value


def is_number(value) -> bool:
    """Whether it is a finite number, which true and false are not."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _are_numbers(value):
    return isinstance(value, list) and all(map(is_number, value))


_ID = (is_id, "a number or text")
_SIZE = (lambda v: is_whole(v) and 0 < v < sys.maxsize, "a whole number of pixels above 0")
_TEXT = (lambda v: isinstance(v, str) and v.strip(), "text")
# No half of a character, which neither a log nor TensorBoard can write.
_NAME = (lambda v: _TEXT[0](v) and v.encode(errors="ignore").decode() == v, "text")
_BOX = (
    lambda v: _are_numbers(v) and len(v) == 4,
    "four finite numbers, [x, y, width, height] in pixels",
)
_REQUIRED = {
    "images": {"id": _ID, "file_name": _TEXT, "width": _SIZE, "height": _SIZE},
    "annotations": {"id": _ID, "image_id": _ID, "category_id": _ID, "bbox": _BOX},
    "categories": {"id": _ID, "name": _NAME},
}
_OPTIONAL = {
    "iscrowd": (lambda v: v in (0, 1), "0 or 1"),
    "ignore": (lambda v: v == 0, "0: COCO's evaluation overlooks it, leave the annotation out"),
}


def sift(json_file, coco) -> tuple[Tables, list[Finding]]:
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
                wrong = [f"{brief.repr(entry)} is no object"]
            if not wrong:
                kept[table].append(entry)
                continue
            has_id = isinstance(entry, dict) and is_id(entry.get("id"))
            name = f"{NAMES[table]} {brief.repr(entry['id'])}" if has_id else f"{table}[{index}]"
            findings.append(Finding("broken entry", f"{json_file}: {name}", "; ".join(wrong)))
    return Tables(**kept), findings
