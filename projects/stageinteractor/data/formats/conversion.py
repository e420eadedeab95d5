"""What the readers of other annotation formats share: mistakes, images, boxes, files left out."""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ...errors import UserError
from ..coco_file import LabelledImage
from ..file_names import is_hidden
from ..reading import header_of, open_image

SHOWN = 20  # mistakes that are listed; the rest is counted
NAMED = 3  # files that a count names
NOISE = 0.01  # pixels; YOLO's rows have six decimals or fewer
CLIPPED = "boxes over the border of their image, clipped"
RENAMED = "found by another spelling of the name, or in another folder"


class Dataset(NamedTuple):
    """A data set that was read from another format."""

    classes: list[str]
    image_root: Path  # folder that file names in the JSON files are relative to
    splits: dict[str, list[LabelledImage]]
    remarks: dict[str, list[Path]]  # what was changed, with the files concerned
    unused: dict[str, list[Path]]  # files that were left out, by reason


class Mistake(UserError):
    """Something wrong in a user's files, at a line of the file where that is known."""

    def __init__(self, what: str, line: int | None = None):
        super().__init__(what)
        self.line = line


class Mistakes(dict[str, None]):
    """All mistakes, each once and with its place: a set that keeps its order."""

    @contextmanager
    def at(self, path: Path, line: int | None = None):
        """Record a Mistake that is raised in this block, and go on after the block."""
        try:
            yield
        except Mistake as error:
            line = error.line or line
            self[f"{path}:{line}: {error}" if line else f"{path}: {error}"] = None
        except OSError as error:  # such as a link to a file that is gone
            self[f"{path}: cannot be read ({error.strerror or error})"] = None

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


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1. Raises Mistake."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise Mistake(f"{path.name} is not text in UTF-8") from error
    return [(n, line.strip()) for n, line in enumerate(lines, start=1) if line.strip()]


def labelled_image(path: Path) -> LabelledImage:
    """An image of the size that training sees, without boxes yet. Raises Mistake.

    Only the header is read, except for PNG, which may have its EXIF data behind the pixels.
    """
    if not path.is_file():
        raise Mistake("is not a file, or a link to a file that is gone")
    try:
        with open_image(path) as image:
            if image.format == "PNG":
                image.load()
            size = header_of(image).upright
    except Exception as error:  # Pillow's readers raise many types
        raise Mistake(f"cannot be read as an image ({error or type(error).__name__})") from error
    if min(size) < 1:
        raise Mistake("is an image without pixels")
    return LabelledImage(path, *size, [])


def clip(corners: Sequence[float], size: tuple[int, int]) -> tuple[tuple[float, ...], float]:
    """Corners inside an image of that size, and how many pixels they were outside at most."""
    inside = tuple(min(max(value, 0), side) for value, side in zip(corners, size * 2))
    return inside, max(abs(value - kept) for value, kept in zip(corners, inside))


def clipped_boxes(images: Iterable[LabelledImage]) -> list[Path]:
    """The image of every box that was clipped by more than rounding explains."""
    return [image.path for image in images for box in image.boxes if box.outside > NOISE]


def checked_classes(names: list[str], source: str) -> list[str]:
    """The names as they are. Raises UserError if there are none, or one occurs twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if not all(name.strip() for name in names):
        raise UserError(f"{source}: a class without a name")
    if twice or not names:
        raise UserError(f"{source}: " + (f"{twice[0]!r} is there twice" if twice else "no classes"))
    return names


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
