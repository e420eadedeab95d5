"""Image files that cannot be read: telling them apart from other errors, and naming them."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from detectron2.data.detection_utils import check_image_size

from ..errors import UserError
from .reading import read_image, reason_of


class Unreadable(NamedTuple):
    """An image file that cannot be read, and why."""

    file_name: str
    reason: str


def unreadable(record: dict, error: Exception) -> Unreadable:
    """What is wrong with the image file of a record whose mapping has failed.

    Raises:
        Exception: `error` itself, if the file can be read and is therefore not the reason.
    """
    try:
        check_image_size(record, read_image(record["file_name"], "RGB"))
    except Exception as reason:  # Pillow's readers raise many types
        return Unreadable(record["file_name"], reason_of(reason))
    raise error


class NameUnreadable:
    """A mapper that returns an `Unreadable` where an image file is the reason why it fails.

    As an error it would reach the main process with the traceback of a worker in its text.

    Args:
        mapper: of Detectron2's dictionaries.
    """

    def __init__(self, mapper: Callable[[dict], Any]):
        self.mapper = mapper

    def __call__(self, record: dict) -> Any | Unreadable:
        try:
            return self.mapper(record)
        except Exception as error:
            return unreadable(record, error)


class ReadableBatches:
    """The batches of a loader whose mapper is a `NameUnreadable`.

    Args:
        loader: of a data set that is evaluated, which must be complete.
        most: how many batches to take; None takes all.
    """

    def __init__(self, loader: Iterable[list], most: int | None = None):
        self.loader, self.most = loader, most
        self.current: list[dict] = []  # the batch that was returned last

    def __len__(self) -> int:
        return min(len(self.loader), self.most or len(self.loader))

    def __iter__(self) -> Iterator[list[dict]]:
        """Return the batches.

        Raises:
            UserError: an image cannot be read.
        """
        for batch in itertools.islice(self.loader, self.most):
            for image in batch:
                if isinstance(image, Unreadable):
                    raise UserError(
                        f"cannot read {image.file_name}: {image.reason}\n"
                        "All images of a test set are evaluated: repair this one, or remove it "
                        "from the annotations"
                    )
            self.current[:] = batch
            yield batch
