"""The kinds of pictures that are accepted, and their conversion for a model."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data import read_picture
from ..data.reading import File, decode, reason_of
from ..errors import UserError

# A path; the content of a file, or a file that is open for reading bytes; an array (H, W, 3), BGR,
# uint8, as OpenCV's; an image of Pillow's; a tensor (3, H, W), RGB, uint8 or, between 0 and 1,
# floating point, as torchvision's.
Picture = str | Path | bytes | BinaryIO | np.ndarray | Image.Image | Tensor


def is_one_picture(given: Any) -> bool:
    """Whether this is a single picture and not many: an iterable of them, or a batch."""
    if isinstance(given, (np.ndarray, Tensor)):
        return given.ndim != 4
    # A dictionary, whose keys would be taken for paths, is one thing, though not a picture.
    single = isinstance(given, (str, Path, bytes, bytearray, memoryview, Image.Image, dict))
    # An open file would be taken for the sequence of its lines.
    return single or hasattr(given, "read") or not isinstance(given, Iterable)


def to_array(picture: Picture) -> np.ndarray:
    """Any picture as (H, W, 3), BGR, uint8.

    `data.reading.decode` says how files and Pillow's images are converted.

    Raises:
        UserError: there is no such file, or it cannot be read.
        ValueError: an array, image or tensor of another shape, type or range.
        TypeError: something else.
    """
    if isinstance(picture, io.TextIOBase):
        raise TypeError('a file that is open as text: open it with mode "rb"')
    if isinstance(picture, (bytearray, memoryview)):
        picture = bytes(picture)
    if isinstance(picture, (str, Path, bytes)) or hasattr(picture, "read"):
        return read_picture(cast(File, picture), "BGR")
    if isinstance(picture, Image.Image):
        return pillow_to_array(picture)
    if isinstance(picture, Tensor):
        return tensor_to_array(picture)
    if not isinstance(picture, np.ndarray):
        raise TypeError(
            "a picture is a path, bytes, an open file, an array, an image of Pillow's or a tensor, "
            f"not {'None' if picture is None else type(picture).__name__}"
        )
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
        raise ValueError(
            f"an array is (H, W, 3), BGR, uint8, not {picture.shape}, {picture.dtype}"
        )
    return picture


def pillow_to_array(picture: Image.Image) -> np.ndarray:
    """Any mode -> (H, W, 3), BGR, uint8. Raises UserError if its file is broken, or ValueError."""
    if not all(picture.size):
        raise ValueError(f"an image of Pillow's is empty: {picture.size}")
    try:
        return decode(picture, "BGR")
    except OSError as error:  # Pillow reads files late
        name = getattr(picture, "filename", "") or "an image of Pillow's"
        raise UserError(f"cannot read {name}: {reason_of(error)}") from error


def tensor_to_array(picture: Tensor) -> np.ndarray:
    """(3, H, W), RGB, uint8 or 0 to 1 -> (H, W, 3), BGR, uint8. Raises ValueError."""
    is_float = picture.is_floating_point()
    if picture.ndim != 3 or len(picture) != 3 or not picture.numel() or not (
        is_float or picture.dtype == torch.uint8
    ):
        raise ValueError(
            f"a tensor is (3, H, W), RGB, uint8 or between 0 and 1, not {tuple(picture.shape)}, "
            f"{picture.dtype}"
        )
    if is_float:
        if not ((picture >= 0) & (picture <= 1)).all():  # NaN neither
            raise ValueError("a tensor in floating point is between 0 and 1: give uint8 for 0..255")
        picture = (picture.float() * 255).round().to(torch.uint8)
    return picture.detach().cpu().flip(0).permute(1, 2, 0).numpy()
