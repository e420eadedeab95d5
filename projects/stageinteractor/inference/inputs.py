"""What people have as a picture, and what a model takes."""

import warnings
from pathlib import Path
from typing import Any, Iterable, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..data import read_picture
from ..errors import UserError

# A path; an array (H, W, 3), BGR, uint8, as OpenCV's; an image of Pillow's; a tensor (3, H, W),
# RGB, uint8 or, between 0 and 1, floating point, as torchvision's.
Picture = Union[str, Path, np.ndarray, Image.Image, Tensor]


def is_one_picture(given: Any) -> bool:
    """Whether it is a single picture, or else many: anything that has them one by one."""
    if isinstance(given, (np.ndarray, Tensor)):
        return given.ndim != 4
    # A dictionary, whose keys would be taken for paths, is one thing that is no picture.
    single = isinstance(given, (str, Path, Image.Image, dict))
    return single or not isinstance(given, Iterable)


def to_array(picture: Picture) -> np.ndarray:
    """Any picture as (H, W, 3), BGR, uint8.

    Files and images of Pillow's are turned as their EXIF tag says, and clipped to 8 bits with a
    warning.

    Raises:
        UserError: there is no such file, or it cannot be read.
        ValueError: an array or tensor of another shape, type or range.
        TypeError: something else.
    """
    if isinstance(picture, (str, Path)):
        read = read_picture(str(picture), "BGR")
        with Image.open(picture) as file:
            warn_of_depth(file, picture)
        return read
    if isinstance(picture, Image.Image):
        return pillow_to_array(picture)
    if isinstance(picture, Tensor):
        return tensor_to_array(picture)
    if not isinstance(picture, np.ndarray):
        raise TypeError(
            "a picture is a path, an array, an image of Pillow's or a tensor, not "
            + type(picture).__name__.replace("NoneType", "None")
        )
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
        raise ValueError(
            f"an array is (H, W, 3), BGR, uint8, not {picture.shape}, {picture.dtype}"
        )
    return picture


def warn_of_depth(image: Image.Image, name: Any):
    """Warn of values that do not fit into 8 bits."""
    if image.mode[0] in "IF":
        warnings.warn(f"{name} has more than 8 bits: values are clipped to 0..255, scale them")


def pillow_to_array(picture: Image.Image) -> np.ndarray:
    """Any mode -> (H, W, 3), BGR, uint8. Raises UserError if its file is broken, or ValueError."""
    if not all(picture.size):
        raise ValueError(f"an image of Pillow's is empty: {picture.size}")
    warn_of_depth(picture, getattr(picture, "filename", "") or "an image of Pillow's")
    try:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))[:, :, ::-1]
    except OSError as error:  # Pillow reads files late
        name = getattr(picture, "filename", "") or "an image of Pillow's"
        raise UserError(f"cannot read {name}: {error}") from error


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
