"""Training batches whose order and augmentation follow from a seed, so that a run can resume.

Detectron2's own loader starts a new order when training resumes.
"""

import functools
import logging
import multiprocessing.queues
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.data import DatasetFromList, DatasetMapper
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError
from .randomness import IMAGE, keep_random_states, seed_random
from .unreadable import Unreadable, unreadable

ATTEMPTS = 10  # to replace an image that cannot be read
LOGGER = logging.getLogger(f"detectron2.{__name__}")  # Detectron2 writes only its own to log.txt


class Draw(NamedTuple):
    """An image in the endless stream of training images."""

    position: int  # in the stream
    image: int  # index into the data set


class TrainingOrder(Sampler):
    """Endless batches of draws for this process, shuffled in every epoch.

    The stream of draws depends on the seed alone. It is cut into shares, which are the part of a
    batch that one process takes and hold either wide or tall images. Processes take turns.

    Args:
        is_wide: whether each image is wider than it is high.
        share: number of images in a share.
        seed: the same in all processes.
    """

    def __init__(self, is_wide: Sequence[bool], share: int, seed: int):
        self.is_wide, self.share, self.seed = is_wide, share, seed
        self.start = 0  # batches to skip

    def __iter__(self) -> Iterator[list[Draw]]:
        rank, processes = comm.get_rank(), comm.get_world_size()
        for number, share in enumerate(self._shares()):
            if number >= self.start * processes and number % processes == rank:
                yield share

    def _shares(self) -> Iterator[list[Draw]]:
        groups: dict[bool, list[Draw]] = {True: [], False: []}
        for draw in self._draws():
            group = groups[self.is_wide[draw.image]]
            group.append(draw)
            if len(group) == self.share:
                yield group[:]
                group.clear()

    def _draws(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(self.seed)
        position = 0
        while True:
            for image in torch.randperm(len(self.is_wide), generator=generator).tolist():
                yield Draw(position, image)
                position += 1


class TrainingImages(Dataset):
    """Maps a draw to the model's input.

    The mapper's random numbers depend on the seed and the draw's position. An image that cannot be
    read is replaced by another one, which names it under ``unreadable``.

    Args:
        records: Detectron2's dictionaries.
        mapper: maps such a dictionary to the model's input.
        order: provides the seed.
    """

    def __init__(
        self, records: Sequence[dict], mapper: Callable[[dict], dict], order: TrainingOrder
    ):
        self.records, self.mapper, self.order = records, mapper, order

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        found, index = [], draw.image
        with keep_random_states():
            for attempt in range(ATTEMPTS):
                seed_random(self.order.seed, IMAGE, draw.position, attempt)
                record = self.records[index]
                try:
                    mapped = self.mapper(record)
                    if mapped is not None:  # None asks for another image, as in Detectron2
                        return {**mapped, "unreadable": found}
                except Exception as error:
                    found.append(unreadable(record, error))
                index = np.random.randint(len(self.records))
        if not found:
            raise ValueError(f"the mapper returned None for {ATTEMPTS} images in a row")
        return {"unreadable": found}


class TrainingMapper(DatasetMapper):
    """Detectron2's mapper. detrex's tools look for the image format as ``img_format``."""

    @functools.wraps(DatasetMapper.__init__)  # overrides may name its arguments
    def __init__(self, *args, img_format: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)


def begin_loading(_worker: int):
    """Prepare a worker process: one thread, no signals from outside, and a report of all errors.

    torchrun and terminals signal whole process groups, but the main process needs its workers to
    finish its step.
    """
    cv2.setNumThreads(0)  # as torch does for its own; the processes share the processors
    if os.name == "posix":
        os.setpgid(0, 0)
    multiprocessing.queues.Queue._on_queue_feeder_error = send_error


def send_error(queue: multiprocessing.queues.Queue, _error: Exception, item: tuple):
    """Report that a batch could not be sent, because the main process would wait for it forever."""
    queue.put((item[0], ExceptionWrapper(where="in a process that loads data")))


class TrainingLoader:
    """Endless batches, which are lists of what the mapper returns; a checkpoint can continue them.

    Images that cannot be read are counted, and named in the log.

    Args:
        dataset: Detectron2's dictionaries.
        mapper: maps such a dictionary to the model's input.
        total_batch_size: images in a batch of all processes together.
        aspect_ratio_grouping: whether the images of one process in a batch are all wide or all
            tall.
        seed: of order and augmentation, the same in all processes; None draws one.
        max_unreadable: share of the images, from 0 to 1, that may be unreadable.
        options: arguments of torch's ``DataLoader``, such as ``num_workers``.
    """

    def __init__(
        self,
        dataset: list[dict],
        *,
        mapper: Callable[[dict], dict],
        total_batch_size: int,
        aspect_ratio_grouping: bool = True,
        seed: int | None = None,
        max_unreadable: float = 0.01,
        **options: Any,
    ):
        self.total_batch_size, self.max_unreadable = total_batch_size, max_unreadable
        self.num_images, self.num_batches = len(dataset), 0
        self.unreadable: dict[str, str] = {}  # reasons by file
        self.order = TrainingOrder(
            [aspect_ratio_grouping and record["width"] > record["height"] for record in dataset],
            total_batch_size // comm.get_world_size(),
            comm.shared_random_seed() if seed is None else seed,
        )
        self.loader = DataLoader(
            TrainingImages(DatasetFromList(dataset, copy=False), mapper, self.order),
            batch_sampler=self.order,
            collate_fn=trivial_batch_collator,
            generator=torch.Generator(),  # by default it would take a number from the global one
            worker_init_fn=begin_loading,
            **options,
        )

    @property
    def seed(self) -> int:
        return self.order.seed

    def __iter__(self) -> Iterator[list[dict]]:
        """Return batches, starting after the last one that was returned.

        Raises:
            UserError: too many images cannot be read.
        """
        self.order.start = self.num_batches
        for batch in self.loader:
            for image in batch:
                for found in image.pop("unreadable"):
                    self._note(found, is_replaced="image" in image)
            self.num_batches += 1
            yield batch

    def _note(self, found: Unreadable, is_replaced: bool):
        if found.file_name in self.unreadable and is_replaced:
            return
        self.unreadable[found.file_name] = found.reason
        count = len(self.unreadable)
        share = count * comm.get_world_size() / self.num_images  # if other processes find as many
        if not is_replaced or share > self.max_unreadable:
            raise UserError(
                f"cannot read {found.file_name}: {found.reason}\n"
                f"{count} of {self.num_images} images could not be read: repair or remove them, or "
                "allow a larger share of unreadable images than "
                f"dataloader.train.max_unreadable={self.max_unreadable:g}"
            )
        LOGGER.warning(
            f"skipped {found.file_name}: {found.reason} ({count} of {self.num_images} images so "
            f"far; dataloader.train.max_unreadable={self.max_unreadable:g} is the largest share)"
        )

    def state_dict(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "images": self.num_batches * self.total_batch_size,
            "num_images": self.num_images,
        }

    def load_state_dict(self, state: dict[str, int]):
        """Continue after the images of a checkpoint, which may have had another batch size."""
        self.order.seed = state["seed"]
        self.num_batches = state["images"] // self.total_batch_size


# What configs call, in place of Detectron2's build_detection_train_loader.
build_train_loader = TrainingLoader
