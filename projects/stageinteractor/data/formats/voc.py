"""Pascal VOC's annotations: an XML file an image, a list of names a split."""

from collections import defaultdict
from pathlib import Path
from typing import Iterable, List, Sequence, Tuple
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from tqdm import tqdm

from ...errors import UserError
from .dataset import (
    IMAGE_SUFFIXES,
    Box,
    Dataset,
    LabelledImage,
    Mistake,
    Mistakes,
    checked_classes,
    find_files,
    image_size,
    number,
    numbered_lines,
)

CORNERS = ("xmin", "ymin", "xmax", "ymax")


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


def read_voc(
    annotations: Path,
    image_root: Path,
    mistakes: Mistakes,
    *,
    lists: Sequence[Path] = (),
    classes: Sequence[str] = (),
    zero_based: bool = False,
) -> Dataset:
    """The data set in VOC files.

    Args:
        annotations, image_root: folders of XML files and of images.
        mistakes: gets what is wrong; such boxes and images are left out.
        lists: text files of names, each a split; without them all is one split.
        classes: names in order, or one file of them; without them those found, sorted.
        zero_based: whether xmin to ymax are edges, counted from 0.

    Raises:
        UserError: files are missing altogether.
    """
    files = {path.stem: path for path in find_files(annotations, "*", {".xml"})}
    images = defaultdict(list)
    for path in find_files(image_root, "*", IMAGE_SUFFIXES):
        images[path.stem].append(path)
    splits = {path.stem: {} for path in lists}
    if len(splits) < len(lists):
        raise UserError("--splits: two files of the same name would become one JSON file")
    for path in lists:
        for line, stem in numbered_lines(path):
            with mistakes.at(path, line):
                if stem not in files:
                    raise Mistake(f"no annotation {annotations / stem}.xml")
                splits[path.stem][stem] = None
    if not splits:
        splits = {"all": files}
        if unused := len(images.keys() - files):
            print(f"{unused} images have no XML file and are left out")
    if classes:
        if len(classes) == 1 and classes[0].endswith(".txt"):
            classes = [name for _, name in numbered_lines(Path(classes[0]))]
        checked_classes(classes, "--classes")
    else:
        classes = voc_classes(files.values(), mistakes)
        if not classes:
            raise UserError(f"no object in any .xml of {annotations}\n{mistakes}".rstrip())

    labelled = {}
    wanted = set().union(*splits.values())
    for stem in tqdm([stem for stem in files if stem in wanted], unit=" images", disable=None):
        with mistakes.at(files[stem]):
            root = parse_voc(files[stem])
            labelled[stem] = image = voc_image(files[stem], images[stem], root)
            size = image.width, image.height
            for item in root.findall("object"):
                with mistakes.at(files[stem], item.line):
                    image.boxes.append(voc_box(item, classes, size, zero_based))
    splits = {
        name: [labelled[stem] for stem in part if stem in labelled] for name, part in splits.items()
    }
    return Dataset(classes, image_root, splits)
