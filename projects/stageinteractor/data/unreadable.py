"""Image files that cannot be read: told apart from other errors, and named."""

import itertools
import os
from typing import Any, Callable, Iterable, Iterator, List, NamedTuple, Optional, Union

import numpy as np
from detectron2.data import detection_utils
from detectron2.data.detection_utils import check_image_size, read_image

from ..errors import UserError

_turn = detection_utils._apply_exif_orientation


def _decode_and_turn(image):
    """Detectron2's `_apply_exif_orientation`, but a broken PNG fails and no TIFF is turned twice.

    Pillow decodes a PNG to find its EXIF tag. Detectron2 goes on when that fails, with an image
    that is black from the broken place on: Pillow does not fail a second time. A TIFF is turned by
    Pillow itself as it is decoded; old versions leave the tag.
    """
    image.load()
    return image if image.format == "TIFF" else _turn(image)


detection_utils._apply_exif_orientation = _decode_and_turn  # for read_image, in all mappers


class Unreadable(NamedTuple):
    """An image file that cannot be read, and why."""

    file_name: str
    reason: str


def unreadable(record: dict, error: Exception) -> Unreadable:
    """What is wrong with the image file of a record whose mapping has failed.

    Raises:
        Exception: `error`, if the file can be read: the reason is another one.
    """
    try:
        check_image_size(record, read_image(record["file_name"], "RGB"))
    except Exception as reason:  # Pillow's readers raise all sorts
        return Unreadable(record["file_name"], reason_of(reason))
    raise error


def read_picture(path: str, image_format: str) -> np.ndarray:
    """A picture (H, W, 3), uint8, turned as its EXIF tag says.

    Args:
        image_format: RGB or BGR.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    if not os.path.isfile(path):
        raise UserError(f"no picture {path}")
    try:
        return read_image(path, image_format)
    except Exception as error:  # Pillow's readers raise all sorts
        raise UserError(f"cannot read {path}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Why an image cannot be read, in a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "no image that Pillow can read" if "cannot identify" in text else text


class NameUnreadable:
    """A mapper that returns what is wrong with an image file, where that is why it fails.

    An error that a process loading data raises reaches the main one with its traceback as text.

    Args:
        mapper: of Detectron2's dictionaries.
    """

    def __init__(self, mapper: Callable[[dict], Any]):
        self.mapper = mapper

    def __call__(self, record: dict) -> Union[Any, Unreadable]:
        try:
            return self.mapper(record)
        except Exception as error:
            return unreadable(record, error)


class ReadableBatches:
    """The batches of a loader whose mapper is a `NameUnreadable`.

    Args:
        loader: of a data set that is evaluated, where no image can be left out.
        most: how many batches to take, None for all.
    """

    def __init__(self, loader: Iterable[list], most: Optional[int] = None):
        self.loader, self.most = loader, most
        self.current: List[dict] = []  # the batch that was given out last

    def __len__(self) -> int:
        return min(len(self.loader), self.most or len(self.loader))

    def __iter__(self) -> Iterator[List[dict]]:
        """All batches.

        Raises:
            UserError: an image cannot be read.
        """
        for batch in itertools.islice(self.loader, self.most):
            for image in batch:
                if isinstance(image, Unreadable):
                    raise UserError(
                        f"cannot read {image.file_name}: {image.reason}\n"
                        "All images of a test set are evaluated: mend it, or take it out of the "
                        "annotations"
                    )
            self.current[:] = batch
            yield batch
