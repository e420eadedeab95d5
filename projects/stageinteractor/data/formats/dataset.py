"""A data set on its way from another format to COCO's, and what is wrong with its files."""

import math
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import (
    NamedTuple,
)

from PIL import ExifTags

from ...errors import UserError
from ..reading import open_image

IMAGE_SUFFIXES = {
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"
}
SHOWN = 20  # mistakes that are listed; the rest is counted
NAMED = 3  # files that a count names
NOISE = 0.01  # pixels; YOLO's rows have six decimals or less
CLIPPED = "boxes over the border of their image, clipped"
RENAMED = "found by another spelling of the name, or in another folder"


class Box(NamedTuple):
    category: int  # index of the class, from 0
    corners: tuple[float, ...]  # x1, y1, x2, y2 in pixels: edges, from 0 to the image's size
    iscrowd: int = 0
    outside: float = 0  # pixels that it reached over the border before it was clipped


class LabelledImage(NamedTuple):
    path: Path
    width: int
    height: int
    boxes: list[Box]


class Dataset(NamedTuple):
    classes: list[str]
    image_root: Path  # folder that file names in the JSON files are relative to
    splits: dict[str, list[LabelledImage]]
    remarks: dict[str, list[Path]]  # what was done beyond copying, with the files concerned
    unused: dict[str, list[Path]]  # files that nothing came of, by reason


class Mistake(UserError):
    """Something wrong in a person's files, at a line of the file where that is known."""

    def __init__(self, what: str, line: int | None = None):
        super().__init__(what)
        self.line = line


class Mistakes(dict[str, None]):
    """All that is wrong, each once and with its place; a set that keeps its order."""

    @contextmanager
    def at(self, path: Path, line: int | None = None):
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


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Lines of a text file that are not blank, with their numbers from 1. Raises Mistake."""
    lines = enumerate(read_text(path).splitlines(), start=1)
    return [(n, line.strip()) for n, line in lines if line.strip()]


def files_below(folder: Path, above: frozenset = frozenset()) -> Iterator[Path]:
    """Everything below a folder and below its links, sorted.

    Hidden folders, and links to a folder that they lie in, are not entered but count as files.
    Raises UserError if the folder is missing.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    here = folder.resolve()
    above = above | {here, *here.parents}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not is_hidden(path) and path.resolve() not in above:
            yield from files_below(path, above)
        else:
            yield path


def is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def with_suffix(paths: Iterable[Path], suffixes: set) -> list[Path]:
    return [path for path in paths if path.suffix.lower() in suffixes and not is_hidden(path)]


def loosely(name: str) -> str:
    """The same for names that differ by case or Unicode form alone."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def unused_files(
    files: Iterable[Path], used: Iterable[Path], reason_of_others: Callable[[Path], str]
) -> dict[str, list[Path]]:
    """Files that are not used, by reason; a file with several names counts once."""
    used = {os.path.realpath(path) for path in used}
    unused = defaultdict(list)
    for path in files:
        if (real := os.path.realpath(path)) not in used:
            used.add(real)
            unused["hidden" if is_hidden(path) else reason_of_others(path)].append(path)
    return unused


def counts(groups: dict[str, list[Path]]) -> str:
    """A line for each group that is not empty: how many files, what they are, and the first."""
    lines = []
    for what, paths in groups.items():
        names = [path.name for path in paths[:NAMED]]
        names += [f"and {len(paths) - NAMED} more"] * (len(paths) > NAMED)
        lines += [f"  {len(paths)} {what}: {', '.join(names)}"] * bool(paths)
    return "\n".join(lines)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) as Detectron2 reads an image: turned as its EXIF data says. Raises Mistake.

    Only headers are read, but for PNG, which may have its EXIF data behind the pixels.
    """
    if not path.is_file():
        raise Mistake("is not a file, or a link to a file that is gone")
    try:
        with open_image(path) as image:
            if image.format == "PNG":
                image.load()
            width, height = image.size
            if image.format == "TIFF":  # whose size some versions of Pillow turn already
                width, height = image.tag_v2[256], image.tag_v2[257]
            try:
                orientation = image.getexif().get(ExifTags.Base.Orientation)
            except Exception:  # whatever is wrong with it, Detectron2 reads on without
                orientation = None
    except Exception as error:  # Pillow's readers raise all sorts
        raise Mistake(f"cannot be read as an image ({error or type(error).__name__})") from error
    if min(width, height) < 1:
        raise Mistake("is an image without pixels")
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def clip(corners: Sequence[float], size: tuple[int, int]) -> tuple[tuple[float, ...], float]:
    """Corners inside an image of that size, and how many pixels they were outside at most."""
    inside = tuple(min(max(value, 0), side) for value, side in zip(corners, size * 2))
    return inside, max(abs(value - kept) for value, kept in zip(corners, inside))


def clipped_boxes(images: Iterable[LabelledImage]) -> list[Path]:
    """The image of every box that was clipped by more than rounding explains."""
    return [image.path for image in images for box in image.boxes if box.outside > NOISE]


def checked_classes(names: list[str], source: str) -> list[str]:
    """Names of classes as they are. Raises UserError unless there are some, all different."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise UserError(f"{source}: " + (f"{twice[0]!r} is there twice" if twice else "no classes"))
    return names


def to_coco(classes: list[str], images: list[LabelledImage], image_root: Path) -> dict:
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
