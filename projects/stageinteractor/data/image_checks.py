"""What can be wrong with the image files of a data set, as far as their heads tell."""

import os
from collections.abc import Iterator

from PIL import Image

from .coco import MIN_IMAGE_SIDE
from .coco_file import Finding, brief, remark
from .missing_images import explain_missing
from .reading import open_image, reason_of

_EXIF_ORIENTATION = 274
_EXIF_TURNS = {
    2: "mirrored", 3: "turned by 180 degrees", 4: "mirrored",
    5: "mirrored and turned by 90 degrees", 6: "turned by 90 degrees",
    7: "mirrored and turned by 90 degrees", 8: "turned by 90 degrees",
}
_EXIF_QUARTER_TURNS = (5, 6, 7, 8)


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
            size, mode = file.size, file.mode
            if file.format == "TIFF":  # whose size some versions of Pillow turn already
                size = file.tag_v2[256], file.tag_v2[257]
            try:
                # Not PNG's own method, which decodes the image to look for tags behind it.
                orientation = Image.Image.getexif(file).get(_EXIF_ORIENTATION)
            except Exception:  # Detectron2 does without broken tags, too
                orientation = None
    except Exception as error:  # Pillow's readers raise all sorts
        yield Finding("unreadable image", where, reason_of(error))
        return
    expected = image["width"], image["height"]
    turned = size[::-1] if orientation in _EXIF_QUARTER_TURNS else size
    if turned != expected:
        what = "{} x {} in the JSON, ".format(*expected) + "{} x {} in the file".format(*turned)
        if turned == expected[::-1] and turned != size:
            what += " as training reads it, rotated by EXIF: remove the tag or turn the boxes"
        elif turned == expected[::-1]:
            what += ": width and height are swapped"
        yield Finding("size mismatch", where, what)
    elif turned == size and orientation in _EXIF_TURNS:
        what = f"{_EXIF_TURNS[orientation]} by its EXIF tag in training and evaluation: its boxes "
        yield remark("EXIF orientation", where, f"{what}must be those of the upright picture")
    if min(turned) < MIN_IMAGE_SIDE:
        what = "{} x {} pixels: training leaves out images ".format(*turned)
        yield remark("small image", where, f"{what}with a side below {MIN_IMAGE_SIDE}")
    if mode.startswith(("I", "F")):
        what = "of 16 bits, the upper 8 are read: 0 to 65535 as 0 to 255"
        if mode == "F":
            what = "floating point is read as 0 to 255, and refused if it has other values"
        yield remark("more than 8 bits", where, what)
