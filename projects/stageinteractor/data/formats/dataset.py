"""A data set on its way from another format to COCO's, and what is wrong with its files."""

import math
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

from PIL import ExifTags, Image

from ...errors import UserError
from ..reading import open_image

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
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
        with open_image(path) as image:
            width, height = image.size
            if image.format == "TIFF":  # whose size some versions of Pillow turn already
                width, height = image.tag_v2[256], image.tag_v2[257]
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
