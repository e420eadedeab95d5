"""What can be wrong with the image files of a data set, as far as their names and headers tell."""

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Container, Iterator
from pathlib import Path
from urllib.parse import unquote

from .coco import MIN_IMAGE_SIDE
from .coco_file import Finding, brief, remark
from .file_names import NameIndex, composed, folded
from .reading import has_late_exif, header_of, open_image, reason_of

MOST_FILES = 200_000  # searched at most: the folder may be a wrong one, such as a whole disk
_TURNS = {
    2: "mirrored", 3: "turned by 180 degrees", 4: "mirrored",
    5: "mirrored and turned by 90 degrees", 6: "turned by 90 degrees",
    7: "mirrored and turned by 90 degrees", 8: "turned by 90 degrees",
}  # by EXIF's number of the orientation
# What one of two names for the same file may have and the other not.
_TRAITS = {
    "backslashes, as Windows writes them": lambda name: "\\" in name,
    "URL encoding, such as %20 for a blank": lambda name: unquote(name) != name,
    "an absolute path or a URL": lambda name: bool(re.match(r"[\\/]|\w+:", name)),
}


def check_images(
    json_file: str, image_root: str, images: list[dict]
) -> tuple[list[Finding], dict[str, int]]:
    """Findings on the image files, and the id of the image in each file that is there."""
    missing, findings, files = [], [], {}
    for image in images:
        where = f"{json_file}: image {image['id']} {brief.repr(image['file_name'])}"
        path = os.path.join(image_root, image["file_name"])
        if not os.path.isfile(path):
            missing.append(image)
            continue
        path = os.path.realpath(path)
        if path in files:
            what = f"image {files[path]} has the same file"
            findings.append(Finding("duplicate file name", where, what))
        else:
            files[path] = image["id"]
            findings += _check_file(path, image, where)
    return explain_missing(json_file, missing, image_root, files, len(images)) + findings, files


def _check_file(path, image, where) -> Iterator[Finding]:
    try:
        with open_image(path) as file:
            if file.format == "PNG" and has_late_exif(path):
                file.load()  # which finds the tag
            header, mode = header_of(file), file.mode
    except Exception as error:  # Pillow's readers raise many types
        yield Finding("unreadable image", where, reason_of(error))
        return
    expected, size = (image["width"], image["height"]), header.upright
    if size != expected:
        what = "{} x {} in the JSON, {} x {} in the file".format(*expected, *size)
        if size == expected[::-1] and size != header.stored:
            what += " as its EXIF tag turns it in training: remove the tag or turn the boxes"
        elif size == expected[::-1]:
            what += ": width and height are swapped"
        yield Finding("size mismatch", where, what)
    elif size == header.stored and header.orientation in _TURNS:
        what = f"training and evaluation read it {_TURNS[header.orientation]}, as its EXIF tag says"
        yield remark("EXIF orientation", where, f"{what}: its boxes must fit the upright picture")
    if min(size) < MIN_IMAGE_SIDE:
        what = "{} x {} pixels: training skips images ".format(*size)
        yield remark("small image", where, f"{what}with a side below {MIN_IMAGE_SIDE}")
    if mode.startswith("I"):
        what = "the upper 8 of its 16 bits are read: 0 to 65535 become 0 to 255"
        yield remark("more than 8 bits", where, what)
    elif mode == "F":
        what = "its floating point values are read as 0 to 255, and refused outside that range"
        yield remark("more than 8 bits", where, what)


def explain_missing(
    json_file: str, images: list[dict], image_root: str, taken: Container[str], total: int
) -> list[Finding]:
    """Why images are missing: one finding for all that the same change would correct.

    Args:
        images: entries of the COCO file whose files are missing.
        image_root: folder that their file names are relative to.
        taken: real paths of the files of other images.
        total: number of images in the COCO file.
    """
    if images and not os.path.isdir(image_root):
        what = f"{brief.repr(image_root)}, the folder of the images, is not a folder"
        return [Finding("missing image", json_file, what)]
    files = _files_below(image_root) if images else []
    index = NameIndex({file: "/".join(_parts(file)) for file in files})
    stems = NameIndex({file: _stem(file) for file in files})
    groups = defaultdict(list)
    for image in images:
        name = image["file_name"]
        found = _most_similar(name, [
            file for file in index.find("/".join(_parts(name))) or stems.find(_stem(name))
            if os.path.realpath(os.path.join(image_root, file)) not in taken
        ])
        advice = "which folder is meant?" if len(found) > 1 else ""
        if len(found) == 1:
            advice = _advice(name, found[0], image_root)
        groups[advice].append((image, found))
    findings = []
    for advice, group in groups.items():
        # Names without an explanation are listed one by one, unless all are missing.
        listed = group[:1] if advice or len(group) == total else group
        for image, found in listed:
            path = os.path.join(image_root, image["file_name"])
            what = f"{brief.repr(path)} is {'a folder' if os.path.isdir(path) else 'not there'}"
            if advice:
                what += f", but there is {' and '.join(map(brief.repr, found[:3]))}: {advice}"
                what += f" ({len(group)} of {total} images)"
            elif len(group) == total > 1:
                what += f", nor is any other of the {total} images: "
                what += f"is {brief.repr(image_root)} their folder?"
            where = f"{json_file}: image {image['id']} {brief.repr(image['file_name'])}"
            findings.append(Finding("missing image", where, what))
    return findings


def _files_below(folder) -> list[str]:
    """Their paths in the folder."""
    walk = os.walk(folder, followlinks=True)
    paths = (os.path.join(place, name) for place, _, names in walk for name in names)
    return [os.path.relpath(path, folder) for path in itertools.islice(paths, MOST_FILES)]


def _most_similar(name, files) -> list[str]:
    """The files whose names agree with `name` for the longest stretch from their ends."""
    shared = {
        file: len(os.path.commonprefix([folded(file)[::-1], folded(name)[::-1]])) for file in files
    }
    return sorted(file for file in files if shared[file] == max(shared.values()))


def _stem(name) -> str:
    """A name without blanks around it and without its suffix."""
    return os.path.splitext("/".join(_parts(name.strip())))[0]


def _parts(name):
    return [part for part in re.split(r"[\\/]+", unquote(name)) if part not in ("", ".")]


def _advice(name, found, image_root):
    """How the two names differ, and what to do about it."""
    path = Path(image_root, found)
    for full in (path.as_posix(), path.absolute().as_posix()):
        if full.endswith(f"/{name}"):
            folder = brief.repr(full.removesuffix(f"/{name}"))
            return f"file names start at another folder, give {folder} as that of the images"
    differences = [trait for trait, has in _TRAITS.items() if has(name) != has(found)]
    named, there = _parts(name), _parts(found)
    endings = [os.path.splitext(parts[-1])[1] for parts in (named, there)]
    if endings[0].casefold() != endings[1].casefold():
        differences.append("the suffix")
        named[-1], there[-1] = (os.path.splitext(parts[-1])[0].strip() for parts in (named, there))
    if folded("/".join(named)) != folded("/".join(there)):
        named, there = named[-1:], there[-1:]
        if not any("absolute" in difference for difference in differences):
            differences.append("the folder")
    if list(map(composed, named)) != list(map(composed, there)):
        differences.append("upper and lower case")
    if [part.casefold() for part in named] != [part.casefold() for part in there]:
        differences.append("their Unicode form (NFC or NFD)")
    return f"the names differ in {' and '.join(differences)}: correct file_name"
