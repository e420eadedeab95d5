"""Images that are not where a COCO file says: how their names differ from those of files there."""

import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Container
from pathlib import Path
from urllib.parse import unquote

from .coco_file import Finding, brief

MOST_FILES = 200_000  # to look through: the folder may be a wrong one, such as a whole disk
# What a name of the JSON can have and that of its file not, or the other way round.
_TRAITS = {
    "backslashes, as Windows writes them": lambda name: "\\" in name,
    "URL encoding, such as %20 for a blank": lambda name: unquote(name) != name,
    "an absolute path or a URL": lambda name: bool(re.match(r"[\\/]|\w+:", name)),
}


def explain_missing(
    json_file: str, images: list[dict], image_root: str, taken: Container[str], total: int
) -> list[Finding]:
    """Why images are missing: one finding for all that a single change would find.

    Args:
        images: entries of the COCO file whose files are not there.
        image_root: folder that their file names are relative to.
        taken: real paths of the files of other images.
        total: number of images in the COCO file.
    """
    if images and not os.path.isdir(image_root):
        what = f"{brief.repr(image_root)}, the folder of the images, is not a folder"
        return [Finding("missing image", json_file, what)]
    similar = _files_by_name(image_root) if images else {}
    groups = defaultdict(list)
    for image in images:
        found = _most_similar(image["file_name"], [
            file for file in similar.get(_fold(_last_part(image["file_name"])), ())
            if os.path.realpath(os.path.join(image_root, file)) not in taken
        ])
        advice = "which folder is meant?" if len(found) > 1 else ""
        if len(found) == 1:
            advice = _advice(image["file_name"], found[0], image_root)
        groups[advice].append((image, found))
    findings = []
    for advice, group in groups.items():
        # Names that nothing is known about are listed one by one, unless all are missing.
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


def _files_by_name(folder) -> dict[str, list[str]]:
    """Files below a folder, relative to it, by the last part of their name."""
    files = defaultdict(list)
    walk = os.walk(folder, followlinks=True)
    paths = (os.path.join(place, name) for place, _, names in walk for name in names)
    for path in itertools.islice(paths, MOST_FILES):
        file = os.path.relpath(path, folder)
        files[_fold(_last_part(file))].append(file)
    return files


def _most_similar(name, files) -> list[str]:
    """The files whose names end as `name` does for longest."""
    shared = {
        file: len(os.path.commonprefix([_fold(file)[::-1], _fold(name)[::-1]])) for file in files
    }
    return sorted(file for file in files if shared[file] == max(shared.values()))


def _parts(name):
    return [part for part in re.split(r"[\\/]+", unquote(name)) if part not in ("", ".")]


def _last_part(name):
    return (_parts(name) or [""])[-1]


def _composed(text):
    return unicodedata.normalize("NFC", text)


def _fold(name):
    return _composed(_composed(name).casefold())


def _advice(name, found, image_root):
    """What the two names differ in, and what to do about it."""
    path = Path(image_root, found)
    for full in (path.as_posix(), path.absolute().as_posix()):
        if full.endswith(f"/{name}"):
            folder = brief.repr(full.removesuffix(f"/{name}"))
            return f"file names start at another folder, give {folder} as that of the images"
    differences = [trait for trait, has in _TRAITS.items() if has(name) != has(found)]
    named, there = _parts(name), _parts(found)
    if _fold("/".join(named)) != _fold("/".join(there)):
        named, there = named[-1:], there[-1:]
        if not any("absolute" in difference for difference in differences):
            differences.append("the folder")
    if list(map(_composed, named)) != list(map(_composed, there)):
        differences.append("upper and lower case")
    if [part.casefold() for part in named] != [part.casefold() for part in there]:
        differences.append("their Unicode form (NFC or NFD)")
    return f"the names differ in {' and '.join(differences)}: correct file_name"
