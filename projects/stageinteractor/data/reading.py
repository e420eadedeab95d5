"""The one way in which a picture is read, by training, evaluation, the tools and the Python API."""

import io
import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from detectron2.data import detection_utils
from detectron2.data.detection_utils import convert_PIL_to_numpy
from PIL import ExifTags, Image

from ..errors import UserError

Image.init()  # registers the formats that this version of Pillow has
# Raster images only: Pillow also opens formats for which it starts another program.
FORMATS = tuple(
    name for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
)
# The files of a folder that are taken for images.
IMAGE_SUFFIXES = {
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"
}

File = str | Path | bytes | BinaryIO

_turn = detection_utils._apply_exif_orientation


class Header(NamedTuple):
    """What is known of an image before its pixels are decoded."""

    stored: tuple[int, int]  # width and height in pixels, before the image is turned upright
    orientation: int  # EXIF's, from 1 to 8; 1 is upright

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the image as `decode` returns it."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored


def open_image(file: File) -> Image.Image:
    """Open an image and read its header only. Raises what Pillow's readers raise."""
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)


def header_of(image: Image.Image) -> Header:
    """The size and orientation of an open image, without decoding it.

    A PNG may hold its EXIF tag behind its pixels, where it is found only if they are loaded.
    """
    size, orientation = image.size, 1
    if image.format == "TIFF":  # some versions of Pillow turn the size already
        size = image.tag_v2[256], image.tag_v2[257]
    try:
        # PNG's own getexif() would decode the image.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises many types for a broken tag, which Detectron2 ignores
        pass
    return Header(size, orientation if orientation in range(1, 9) else 1)


def has_late_exif(path: str) -> bool:
    """Whether a PNG has its EXIF data behind the pixels, where only decoding finds it."""
    with open(path, "rb") as file:
        file.seek(8)
        is_behind = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            is_behind = is_behind or kind == b"IDAT"
            if kind == b"eXIf":
                return is_behind
            file.seek(length + 4, os.SEEK_CUR)
    return False


def decode(image: Image.Image, image_format: str | None = None) -> np.ndarray:
    """The pixels of an open image of any kind, decoded alike wherever a picture is read.

    For ordinary images of 8 bits, this is what Detectron2's ``read_image`` returns.

    - Images are turned upright as their EXIF tag says; a broken tag is ignored.
    - Of several frames or pages, the first is taken.
    - Transparency is ignored: the colours that are stored beneath it show.
    - Grey, 1 bit, palette and CMYK images become red, green and blue.
    - Of 16 bits, the upper 8 are taken: 0 to 65535 become 0 to 255. Pillow itself does this to
      colours of 16 bits. It sometimes holds grey of 16 bits as 32 bits, which is treated alike.
    - Floating point values are taken as 0 to 255, and rounded.

    Returns:
        (H, W, 3), uint8.

    Raises:
        ValueError: values of more than 8 bits are outside these ranges.
        Exception: whatever Pillow's readers raise while decoding.
    """
    # Pillow decodes a PNG to find its EXIF tag. If that fails, Detectron2 goes on with an image
    # that is black from the broken place on, because Pillow does not fail a second time.
    image.load()
    # Pillow turns a TIFF itself when it decodes it, but old versions keep the tag.
    upright = image if image.format == "TIFF" else _turn(image)
    return convert_PIL_to_numpy(to_8_bits(upright), image_format)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Convert an image of more than 8 bits as `decode` describes; return others as they are."""
    if image.mode[0] not in "IF":
        return image
    is_float = image.mode == "F"
    values, highest = np.asarray(image), 255 if is_float else 65535
    first, last = values.min(), values.max()
    # Values that fit a smaller type were probably meant for it, and would come out black.
    if not (0 <= first and last <= highest) or 0 < last <= (1 if is_float else 255):
        raise ValueError(
            f"values from {first:g} to {last:g} in mode {image.mode}, which has 0 to {highest}: "
            "scale them to 0 to 255 and save them with 8 bits"
        )
    return Image.fromarray((np.rint(values) if is_float else values >> 8).astype(np.uint8))


def read_image(file_name: File, format: str | None = None) -> np.ndarray:
    """Read an image as `decode` does, with the arguments of Detectron2's function."""
    with open_image(file_name) as image:
        return decode(image, format)


detection_utils.read_image = read_image  # Detectron2's mappers call it by this name


def read_picture(file: File, image_format: str) -> np.ndarray:
    """Read a picture (H, W, 3), uint8, as `decode` does.

    Args:
        file: a path, the content of a file, or a file that is open for reading bytes.
        image_format: RGB or BGR.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    if isinstance(file, (str, Path)) and not os.path.isfile(file):
        raise UserError(f"no picture {file}")
    try:
        return read_image(file, image_format)
    except Exception as error:  # Pillow's readers raise many types
        raise UserError(f"cannot read {name_of(file)}: {reason_of(error)}") from error


def name_of(file: File) -> str:
    """What to call a file in a message."""
    if isinstance(file, bytes):
        return f"a picture of {len(file)} bytes"
    return str(file if isinstance(file, (str, Path)) else getattr(file, "name", "a picture"))


def reason_of(error: Exception) -> str:
    """Why an image cannot be read, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify" in text:
        return f"not an image in one of the formats {', '.join(FORMATS)}"
    return text
