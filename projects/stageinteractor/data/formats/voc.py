"""Pascal VOC's annotations: an XML file for each image, a list of names for each split."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from tqdm import tqdm

from ...errors import UserError
from ..coco_file import Box, LabelledImage
from ..file_names import NameIndex, files_below, with_suffix
from ..reading import IMAGE_SUFFIXES
from .conversion import (
    CLIPPED,
    RENAMED,
    Dataset,
    Mistake,
    Mistakes,
    checked_classes,
    clip,
    clipped_boxes,
    labelled_image,
    number,
    numbered_lines,
    unused_files,
)

CORNERS = ("xmin", "ymin", "xmax", "ymax")
FROM_ZERO = "; if this data set counts pixels from 0, add --zero-based"


class LineElement(Element):
    line: int


def parse_voc(content: bytes) -> LineElement:
    """The root of a VOC file; every element has its `line`.

    Raises Mistake if it is something else, or declares entities, which could expand without end.
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
        parser.Parse(content, True)
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


def voc_corners(item: Element, zero_based: bool = False) -> tuple[list[float], list[float]]:
    """The four numbers of an object, and its edges x1, y1, x2, y2 counted from 0. Raises Mistake.

    VOC counts pixels from 1 and includes the last: the box of the first pixel is 1, 1, 1, 1.
    """
    written = [number(text_in(item, f"bndbox/{key}"), f"<{key}>") for key in CORNERS]
    return written, written if zero_based else [x - a for x, a in zip(written, (1, 1, 0, 0))]


def voc_classes(files: Iterable[Path], mistakes: Mistakes) -> list[str]:
    """Sorted names of the objects in VOC files."""
    names = set()
    for path in files:
        with mistakes.at(path):
            objects = parse_voc(path.read_bytes()).findall("object")
            names |= {text_in(item, "name") for item in objects}
    return sorted(names - {""})


def voc_box(item: Element, classes: list[str], size: tuple[int, int], zero_based: bool) -> Box:
    """An object as a box. Raises Mistake if it is invalid or outside an image of that size."""
    name, difficult = text_in(item, "name"), text_in(item, "difficult")
    if name not in classes:
        raise Mistake(f"class {name!r} is not in --classes" if name else "object without <name>")
    if difficult not in ("", "0", "1"):
        raise Mistake(f"<difficult> is {difficult!r}: 0 or 1")
    written, corners = voc_corners(item, zero_based)
    x1, y1, x2, y2 = corners
    inside, outside = clip(corners, size)
    place = "box " + " ".join(f"{value:g}" for value in written)
    if x1 >= x2 or y1 >= y2:
        raise Mistake(f"{place} has no area")
    if outside > 1:
        hint = FROM_ZERO if min(written) == 0 else ""
        raise Mistake(f"{place} is not inside the image of {size[0]} x {size[1]} pixels{hint}")
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise Mistake(f"{place} has no area inside the image")
    return Box(classes.index(name), inside, int(difficult or 0), outside)


def names_below(folder: Path, paths: Iterable[Path]) -> NameIndex:
    """Files by their path below a folder, without the suffix."""
    return NameIndex({path: path.relative_to(folder).with_suffix("").as_posix() for path in paths})


def voc_image(
    file: Path, candidates: list[Path], image_root: Path, root: Element
) -> LabelledImage:
    """The image that a VOC file describes, without boxes. Raises Mistake."""
    if len(candidates) != 1:
        found = ", ".join(str(path.relative_to(image_root)) for path in candidates) or "none"
        raise Mistake(f"needs one image named {file.stem}.* in --images, found: {found}")
    image = labelled_image(candidates[0])
    written = [text_in(root, f"size/{side}") for side in ("width", "height")]
    written = [number(text, "<size>") for text in written if text]
    if any(written) and written != [image.width, image.height]:  # some tools omit it or write 0
        raise Mistake(
            f"<size> is {' x '.join(f'{side:g}' for side in written)}, but {image.path.name} has "
            f"{image.width} x {image.height} pixels when turned as its EXIF data says"
        )
    return image


def read_lists(
    lists: Sequence[Path], files: NameIndex, folder: Path, mistakes: Mistakes
) -> dict[str, dict[Path, None]]:
    """The XML files of each split, in order. Raises UserError for two lists of the same name."""
    splits: dict[str, dict[Path, None]] = {path.stem: {} for path in lists}
    if len(splits) < len(lists):
        raise UserError("--splits: two files of the same name would become one JSON file")
    for path in lists:
        for line, name in numbered_lines(path):
            with mistakes.at(path, line):
                found = files.find(name)
                if not found:
                    raise Mistake(f"no annotation {folder / name}.xml")
                if len(found) > 1:
                    raise Mistake(f"{name} may be any of {', '.join(map(str, found))}")
                splits[path.stem][found[0]] = None
    return splits


def read_voc(
    annotations: Path,
    image_root: Path,
    mistakes: Mistakes,
    *,
    lists: Sequence[Path] = (),
    classes: Sequence[str] = (),
    zero_based: bool = False,
) -> Dataset:
    """Read a data set in VOC's format.

    Args:
        annotations, image_root: folders of XML files and of images.
        mistakes: receives what is wrong; such boxes and images are left out.
        lists: text files of names, one for each split; without them there is one split.
        classes: names in order, or one file of them; without them those found, sorted.
        zero_based: whether xmin to ymax are edges, counted from 0.

    Raises:
        UserError: files are missing, or there is no class.
    """
    below = [*files_below(annotations)], [*files_below(image_root)]
    files = names_below(annotations, with_suffix(below[0], {".xml"}))
    images = names_below(image_root, with_suffix(below[1], IMAGE_SUFFIXES))
    # An image that has the exact name of an XML file does not belong to another one.
    exact = set(files.names.values())
    taken = {path for path, name in images.names.items() if name in exact}
    image_of = {file: images.find(name, taken) for file, name in files.names.items()}
    times_meant = Counter(path for paths in image_of.values() for path in paths)
    splits = {"all": dict.fromkeys(files.names)}
    if lists:
        splits = read_lists(lists, files, annotations, mistakes)
    if classes:
        if len(classes) == 1 and classes[0].endswith(".txt"):
            classes = [name for _, name in numbered_lines(Path(classes[0]))]
        checked_classes(classes, "--classes")
    else:
        classes = voc_classes(files.names, mistakes)
        if not classes:
            raise UserError(f"no object in any .xml of {annotations}\n{mistakes}".rstrip())

    labelled = {}
    wanted = set().union(*splits.values())
    in_order = [file for file in files.names if file in wanted]
    for file in tqdm(in_order, unit=" images", disable=None):
        with mistakes.at(file):
            root = parse_voc(file.read_bytes())
            image = voc_image(file, image_of[file], image_root, root)
            if times_meant[image.path] > 1:
                raise Mistake(f"{image.path} could be the image of another XML file, too")
            labelled[file] = image
            size = image.width, image.height
            for item in root.findall("object"):
                with mistakes.at(file, item.line):
                    image.boxes.append(voc_box(item, classes, size, zero_based))
    found = labelled.values()
    starts = [0 in box.corners[:2] and box.outside == 1 for image in found for box in image.boxes]
    hint = FROM_ZERO if any(starts) and not zero_based else ""
    renamed = [
        image.path for file, image in labelled.items()
        if images.names[image.path] != files.names[file]
    ]
    remarks = {CLIPPED + hint: clipped_boxes(found), f"images {RENAMED}": renamed}

    def reason(path: Path) -> str:
        if path in files.names or path in times_meant:
            return "in no list of --splits"
        return "images without an XML file" if path in images.names else "neither XML nor images"

    used = [*lists, *wanted, *(path for file in wanted for path in image_of[file])]
    unused = unused_files(below[0] + below[1], used, reason)
    splits = {
        name: [labelled[file] for file in part if file in labelled] for name, part in splits.items()
    }
    return Dataset(classes, image_root, splits, remarks, unused)
