"""Where a run continues, and what has changed since it was saved."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from ..checkpoint import SafeCheckpointer
from ..checkpoint.model_file import other_classes
from ..config.main_process import in_main_process
from ..config.portable_config import portable_config
from ..config.preflight import categories, class_names, dataset_names
from ..errors import UserError
from .hooks import ModelEMA
from .trainer import Trainer

# Settings that may change when a run is resumed, and what that does.
CHANGES = {
    "images_a_step": "{now} images a step instead of {before}: training continues at iteration "
    "{first}, with the next images of the epoch; the learning rate stays",
    "processes": "{now} processes instead of {before}: images come in the same order, but wide and "
    "tall images are grouped for another number of processes",
    "learning_rate": "the learning rate of the run, {before:g}, stays: optimizer.lr={now:g} takes "
    "effect with train.init_checkpoint=FILE in another train.output_dir",
    "max_iter": "{now} iterations instead of {before}: the schedule is stretched to them",
    "num_images": "{now} training images instead of {before}: they come in another order",
}
LOGGER = logging.getLogger(f"detectron2.{__name__}")


class RunSettings:
    """The settings of a run that its checkpoints record, and those of the checkpoint it resumed.

    Args:
        cfg: the config, its schedule fitted to the data.
        num_images: number of training images.
        identity: what must not change unnoticed: the `fingerprint` of the images of each split, the
            kind of optimizer, and the names of its parameters by group.
    """

    def __init__(self, cfg: DictConfig, num_images: int, **identity: Any):
        self.in_epochs = cfg.train.epochs is not None
        self.now = {
            "images_a_step": cfg.dataloader.train.total_batch_size * cfg.train.accumulation_steps,
            "processes": comm.get_world_size(),
            "learning_rate": float(cfg.optimizer.lr),
            "max_iter": cfg.train.max_iter,
            "num_images": num_images,
            **identity,
        }
        self.saved: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.now

    def load_state_dict(self, state: dict[str, Any]):
        self.saved = state

    def first_iteration(self, iteration: int) -> int:
        """Where a run continues that was saved after ``iteration``, counted from 0.

        A schedule in epochs continues at the same epoch, even if the images a step have changed.
        The result does not exceed the length of the run: its last checkpoint may have been saved
        after the last iteration.
        """
        done = min(iteration + 1, self.saved.get("max_iter", iteration + 1))
        before, now = self.saved.get("images_a_step"), self.now["images_a_step"]
        if self.in_epochs and before is not None:
            done = done * before // now
        return min(done, self.now["max_iter"])

    def changes(self, first: int) -> list[str]:
        """A line for each setting that has changed, with its effect.

        Args:
            first: iteration at which training continues.
        """
        changed = [
            name for name in CHANGES if name in self.saved and self.saved[name] != self.now[name]
        ]
        if "images_a_step" in changed and "max_iter" in changed:
            changed.remove("max_iter")  # follows from it
        return [
            CHANGES[name].format(before=self.saved[name], now=self.now[name], first=first)
            for name in changed
        ]


def build_checkpointer(
    cfg: DictConfig, trainer: Trainer, datasets: dict[str, list[dict]], ema: ModelEMA | None
) -> SafeCheckpointer:
    """The checkpointer of a run: it saves everything that the run needs to continue.

    Args:
        cfg: the config, its schedule fitted to the data.
        trainer: its model, optimizer and hooks are saved.
        datasets: Detectron2's dictionaries of the images of ``train`` and ``test``.
        ema: the moving average of the weights, if there is one.
    """
    source = cfg.dataloader.train.dataset
    checkpointer = SafeCheckpointer(
        trainer.model,
        cfg.train.output_dir,
        class_names=class_names(source),
        config=portable_config(cfg, categories(source)),
        trainer=trainer,
    )
    # The checkpointer's model is not wrapped, so names do not depend on the number of processes.
    names = {parameter: name for name, parameter in checkpointer.model.named_parameters()}
    identity = {
        "images": {
            split: fingerprint(records, cfg.dataloader[split].dataset)
            for split, records in datasets.items()
        },
        "optimizer": type(trainer.optimizer).__name__,
        "parameters": [
            [names[p] for p in group["params"]] for group in trainer.optimizer.param_groups
        ],
    }
    settings = RunSettings(cfg, len(datasets["train"]), **identity)
    checkpointer.add_checkpointable("run", settings)
    if hasattr(trainer.data_loader, "load_state_dict"):  # Detectron2's starts its order again
        checkpointer.add_checkpointable("data", trainer.data_loader)
    if ema:
        checkpointer.add_checkpointable("model_ema", ema.averaged)
    return checkpointer


def load_start(
    checkpointer: SafeCheckpointer, options: DictConfig, classes: Sequence[str], resume: bool
) -> int:
    """Load the last checkpoint of the run, if it is resumed and has one, or the initial weights.

    Args:
        checkpointer: of `build_checkpointer`.
        options: ``train`` of the config.
        classes: names of the classes of the test set.
        resume: whether to look for a checkpoint of the run.

    Returns:
        the iteration at which training starts.

    Raises:
        UserError: a checkpoint cannot be read or does not fit.
    """
    last = checkpoint_to_resume(checkpointer, options.accept_changes) if resume else ""
    if last:
        checkpointer.load(last)
        settings = checkpointer.checkpointables["run"]
        first = settings.first_iteration(checkpointer.checkpointables["trainer"].iter)
        for change in settings.changes(first):
            LOGGER.warning(f"resuming: {change}")
        return first
    rest = checkpointer.load(options.init_checkpoint, checkpointables=[])
    if different := other_classes(rest.get("class_names", []), classes):
        LOGGER.warning(f"the checkpoint {different}")
    return 0


def checkpoint_to_resume(checkpointer: SafeCheckpointer, accept_changes: bool) -> str:
    """The file from which a run continues, as the main process finds it; empty without one.

    Args:
        checkpointer: of `build_checkpointer`; nothing of it has been restored.
        accept_changes: whether classes and data may differ from those of the checkpoint.

    Raises:
        UserError: the file cannot be read, does not fit, or is not visible to a process.
    """

    def find() -> str:
        found = checkpointer.get_checkpoint_file()
        if found:
            check_resumable(found, checkpointer, accept_changes)
        return found

    found = in_main_process(find)
    if found and not all(comm.all_gather(os.path.isfile(found))):
        raise UserError(
            f"not all machines see {found}: train.output_dir has to be a folder that they share"
        )
    return found


def check_resumable(path: str, checkpointer: SafeCheckpointer, accept_changes: bool):
    """Compare a checkpoint with the run that is about to continue from it.

    Raises:
        UserError: weights, optimizer, classes or data differ.
    """
    saved, now = checkpointer.read(path), checkpointer.checkpointables["run"].now
    before = {**now, **saved.rest.get("run", {})}  # earlier versions did not record everything
    misfit = other_weights(saved.weights, checkpointer.model) or other_parameters(before, now)
    if "parameters" not in saved.rest.get("run", {}):
        ours = checkpointer.checkpointables["trainer"].optimizer.state_dict()
        misfit = misfit or other_groups(saved.rest["trainer"].get("optimizer", ours), ours)
    changes = [other_classes(saved.class_names, checkpointer.class_names)]
    for split in before["images"].keys() & now["images"].keys():
        if different := other_images(before["images"][split], now["images"][split]):
            changes.append(f"images of dataloader.{split}: {different}")
    found = "; ".join(filter(None, [misfit, *changes]))
    if not found:
        return
    if accept_changes and not misfit:
        LOGGER.warning(f"resuming {path} with train.accept_changes: {found}")
        return
    advice = "Start" if misfit else "Continue with train.accept_changes=true, or start"
    raise UserError(
        f"cannot resume {path}: {found}\n{advice} another run from its weights: "
        f"train.init_checkpoint={path} train.output_dir=NEW_FOLDER"
    )


def other_weights(saved: dict[str, torch.Tensor], model: nn.Module) -> str:
    """The first weight of a model that a checkpoint lacks or has in another shape; else empty."""
    for name, value in model.state_dict().items():
        theirs, ours = tuple(saved.get(name, value).shape), tuple(value.shape)
        if theirs != ours:
            return f"{name} is {theirs} there and {ours} in the config"
    missing = [name for name, _ in model.named_parameters() if name not in saved]
    return f"{missing[0]} is not there" if missing else ""


def other_parameters(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Why an optimizer cannot take the state of another one; empty if it can.

    Args:
        before, now: ``optimizer``, its kind, and ``parameters``, their names by group.
    """
    if before["optimizer"] != now["optimizer"]:
        return f"was trained with {before['optimizer']}, the config has {now['optimizer']}"
    if before["parameters"] == now["parameters"]:
        return ""
    theirs, ours = (set(chain(*settings["parameters"])) for settings in (before, now))
    if theirs == ours:
        return "the optimizer's parameters are in other groups or in another order"
    first = min(theirs ^ ours)
    where = "there and not in the config" if first in theirs else "in the config and not there"
    return f"{first} is trained {where}"


def other_groups(before: dict[str, Any], now: dict[str, Any]) -> str:
    """`other_parameters` for the states of two optimizers, which lack names."""
    theirs, ours = ([len(g["params"]) for g in state["param_groups"]] for state in (before, now))
    if theirs == ours:
        return ""
    return f"{theirs} parameters are trained in its groups there and {ours} in the config"


def fingerprint(records: list[dict], dataset: DictConfig) -> torch.Tensor:
    """Two hashes for each image, (N, 2) int64: of its name, and of its size and boxes.

    They depend neither on the order of the boxes nor on the location of the image folder.

    Args:
        records: Detectron2's dictionaries of the images.
        dataset: the config's data set.
    """
    roots = [MetadataCatalog.get(name).get("image_root") for name in dataset_names(dataset)]
    roots = [os.path.join(root, "") for root in roots if root]
    rows = []
    for record in records:
        name = record["file_name"]
        root = next((root for root in roots if name.startswith(root)), "")
        boxes = sorted(
            (item["category_id"], item.get("iscrowd", 0), int(item["bbox_mode"]),
             *map(float, item["bbox"]))
            for item in record.get("annotations", [])
        )
        content = repr((record.get("height"), record.get("width"), boxes))
        rows.append([hashed(name.removeprefix(root)), hashed(content)])
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


def hashed(text: str) -> int:
    """A hash of 64 bits that is the same on every machine."""
    digest = hashlib.blake2b(text.encode(errors="backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def other_images(before: torch.Tensor, now: torch.Tensor) -> str:
    """How many images differ between two fingerprints, in any order; empty if none does."""
    old, new = (Counter(map(tuple, rows.tolist())) for rows in (before, now))
    gone, added = (Counter(name for name, _ in rows.elements()) for rows in (old - new, new - old))
    changed = gone & added
    counts = {
        "new": (added - changed).total(),
        "missing": (gone - changed).total(),
        "with other boxes, classes or another size": changed.total(),
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)
