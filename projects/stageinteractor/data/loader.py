"""Training batches whose order and augmentation follow from a seed, so that a run can resume.

Detectron2's own loader starts its order anew when training resumes.
"""

import logging
import multiprocessing.queues
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError
from .randomness import IMAGE, keep_random_states, seed_random
from .unreadable import Unreadable, unreadable

ATTEMPTS = 10  # at an image in place of one that cannot be read
LOGGER = logging.getLogger(f"detectron2.{__name__}")  # Detectron2 writes only its own to log.txt


class Draw(NamedTuple):
    """An image of the endless stream."""

    position: int  # in the stream
    image: int  # index into the data set


class TrainingOrder(Sampler):
    """Endless batches of draws, shuffled epoch by epoch: the share of this process.

    The stream of draws depends on the seed alone. It is cut into shares, one process' part of a
    batch, each of wide or of tall images; processes take shares in turn.

    Args:
        is_wide: of each image.
        share: images of a process in a batch.
        seed: the same in all processes.
    """

    def __init__(self, is_wide: Sequence[bool], share: int, seed: int):
        self.is_wide, self.share, self.seed = is_wide, share, seed
        self.start = 0  # batches to leave out

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
    """Maps a draw to what the model takes.

    What the mapper draws depends on the seed and the draw's position. In place of an image that
    cannot be read comes another one, which says so under ``unreadable``.

    Args:
        records: Detectron2's dictionaries.
        mapper: of such a dictionary.
        order: has the seed.
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
                    if mapped is not None:  # which means, in Detectron2, to take another image
                        return {**mapped, "unreadable": found}
                except Exception as error:
                    found.append(unreadable(record, error))
                index = np.random.randint(len(self.records))
        if not found:
            raise ValueError(f"the mapper has left out {ATTEMPTS} images in a row")
        return {"unreadable": found}


def begin_loading(_worker: int):
    """For a process that loads data: keep it out of reach of signals, and errors in its reach.

    The main process needs it to end its step, and torchrun and terminals tell whole process groups
    to stop.
    """
    if os.name == "posix":
        os.setpgid(0, 0)
    multiprocessing.queues.Queue._on_queue_feeder_error = send_error


def send_error(queue: multiprocessing.queues.Queue, _error: Exception, item: tuple):
    """Send why a batch could not be sent, for which the main process would wait forever."""
    queue.put((item[0], ExceptionWrapper(where="in a process that loads data")))


class TrainingLoader:
    """Endless batches, lists of what the mapper returns, that go on where a checkpoint was.

    Images that cannot be read are counted, and named in the log.

    Args:
        records: Detectron2's dictionaries.
        mapper: of such a dictionary.
        total_batch_size: images a batch, of all processes together.
        seed: the same in all processes.
        max_unreadable: share of the images that training may do without.
        options: arguments of torch's ``DataLoader``.
    """

    def __init__(
        self,
        records: Sequence[dict],
        mapper: Callable[[dict], dict],
        *,
        is_wide: Sequence[bool],
        total_batch_size: int,
        seed: int,
        max_unreadable: float,
        **options: Any,
    ):
        self.total_batch_size, self.max_unreadable = total_batch_size, max_unreadable
        self.num_images, self.num_batches = len(records), 0
        self.unreadable: dict[str, str] = {}  # reasons by file
        self.order = TrainingOrder(is_wide, total_batch_size // comm.get_world_size(), seed)
        self.loader = DataLoader(
            TrainingImages(records, mapper, self.order),
            batch_sampler=self.order,
            collate_fn=trivial_batch_collator,
            generator=torch.Generator(),  # else it draws a number of its own from the step's
            worker_init_fn=begin_loading,
            **options,
        )

    @property
    def seed(self) -> int:
        return self.order.seed

    def __iter__(self) -> Iterator[list[dict]]:
        """Batches from the first one that has not been given out.

        Raises:
            UserError: more images than may be cannot be read.
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
        share = count * comm.get_world_size() / self.num_images  # if others find as many
        if not is_replaced or share > self.max_unreadable:
            raise UserError(
                f"cannot read {found.file_name}: {found.reason}\n"
                f"{count} of {self.num_images} images could not be read: mend or remove them, or "
                "let training do without a larger share than "
                f"dataloader.train.max_unreadable={self.max_unreadable:g}"
            )
        LOGGER.warning(
            f"skipped {found.file_name}: {found.reason} ({count} of {self.num_images} images so "
            f"far, dataloader.train.max_unreadable={self.max_unreadable:g} of all may be)"
        )

    def state_dict(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "images": self.num_batches * self.total_batch_size,
            "num_images": self.num_images,
        }

    def load_state_dict(self, state: dict[str, int]):
        """Go on after the images of a checkpoint, whatever its batch size was."""
        self.order.seed = state["seed"]
        self.num_batches = state["images"] // self.total_batch_size


def build_train_loader(
    dataset: list[dict],
    *,
    mapper: Callable[[dict], dict],
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    seed: int | None = None,
    max_unreadable: float = 0.01,
    **options: Any,
) -> TrainingLoader:
    """In place of Detectron2's ``build_detection_train_loader``, see there.

    Args:
        dataset: Detectron2's dictionaries.
        mapper: of such a dictionary.
        total_batch_size: images a batch, of all processes together.
        aspect_ratio_grouping: whether images of a process in a batch are all wide or all tall.
        num_workers: processes that load data.
        seed: of order and augmentation, the same in all processes; None draws one.
        max_unreadable: share of the images that training may do without, as they cannot be read.
        options: arguments of torch's ``DataLoader``.
    """
    return TrainingLoader(
        DatasetFromList(dataset, copy=False),
        mapper,
        is_wide=[
            aspect_ratio_grouping and record["width"] > record["height"] for record in dataset
        ],
        total_batch_size=total_batch_size,
        seed=comm.shared_random_seed() if seed is None else seed,
        max_unreadable=max_unreadable,
        num_workers=num_workers,
        **options,
    )
