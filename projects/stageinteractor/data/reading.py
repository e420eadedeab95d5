"""The one way in which a picture is read, by training, evaluation, the tools and the Python API."""

import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from detectron2.data import detection_utils
from detectron2.data.detection_utils import convert_PIL_to_numpy
from PIL import Image

from ..errors import UserError

Image.init()  # so that it is known which formats this version of Pillow has
# Raster images only: Pillow also opens formats for which it starts another program.
FORMATS = tuple(
    name for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
)

File = str | Path | bytes | BinaryIO

_turn = detection_utils._apply_exif_orientation


def open_image(file: File) -> Image.Image:
    """An image of which only the header has been read; raises what Pillow's readers raise."""
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)


def decode(image: Image.Image, image_format: str | None = None) -> np.ndarray:
    """What the pixels of an image of any kind mean, wherever a picture is read.

    Of ordinary images of 8 bits, this is what Detectron2's ``read_image`` returns.

    - Images are upright, as their EXIF tag says; a tag that is broken is ignored.
    - Of several frames or pages, the first is the picture.
    - Transparency is ignored: the colours that are stored beneath it show.
    - Grey, 1 bit, palette and CMYK become red, green and blue.
    - Of 16 bits, the upper 8 are taken: 0 to 65535 become 0 to 255. Pillow does so with colours of
      16 bits. It holds grey of 16 bits as 32 bits in places, so that those mean the same.
    - Floating point is 0 to 255, rounded.

    Returns:
        (H, W, 3), uint8.

    Raises:
        ValueError: numbers beyond 8 bits have another range.
        Exception: whatever Pillow's readers raise; pixels are decoded here.
    """
    # Pillow decodes a PNG to find its EXIF tag. Detectron2 goes on when that fails, with an image
    # that is black from the broken place on: Pillow does not fail a second time.
    image.load()
    # A TIFF is turned by Pillow itself as it is decoded; old versions leave the tag.
    upright = image if image.format == "TIFF" else _turn(image)
    return convert_PIL_to_numpy(to_8_bits(upright), image_format)


def to_8_bits(image: Image.Image) -> Image.Image:
    """See `decode`. Images of 8 bits or fewer are returned as they are."""
    if image.mode[0] not in "IF":
        return image
    is_float = image.mode == "F"
    values, highest = np.asarray(image), 255 if is_float else 65535
    first, last = values.min(), values.max()
    # What fits into the range of something smaller was meant for that, and would come out black.
    if not (0 <= first and last <= highest) or 0 < last <= (1 if is_float else 255):
        raise ValueError(
            f"values from {first:g} to {last:g} in mode {image.mode}, which has 0 to {highest}: "
            "scale them to 0 to 255 and save them with 8 bits"
        )
    return Image.fromarray((np.rint(values) if is_float else values >> 8).astype(np.uint8))


def read_image(file_name: File, format: str | None = None) -> np.ndarray:
    """In place of Detectron2's function, with its arguments: an image as `decode` has it."""
    with open_image(file_name) as image:
        return decode(image, format)


detection_utils.read_image = read_image  # in all mappers


def read_picture(file: File, image_format: str) -> np.ndarray:
    """A picture (H, W, 3), uint8, see `decode`.

    Args:
        file: a path, the content of a file, or a file that is open for reading bytes.
        image_format: RGB or BGR.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    if isinstance(file, (str, Path)) and not os.path.isfile(file):
        raise UserError(f"no picture {file}")
    try:
        return read_image(file, image_format)
    except Exception as error:  # Pillow's readers raise all sorts
        raise UserError(f"cannot read {name_of(file)}: {reason_of(error)}") from error


def name_of(file: File) -> str:
    """What to call a file in a message."""
    if isinstance(file, bytes):
        return f"a picture of {len(file)} bytes"
    return str(file if isinstance(file, (str, Path)) else getattr(file, "name", "a picture"))


def reason_of(error: Exception) -> str:
    """Why an image cannot be read, in a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify" in text:
        return f"not an image in one of the formats {', '.join(FORMATS)}"
    return text
