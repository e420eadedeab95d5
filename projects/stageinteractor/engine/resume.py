"""Where a run goes on, and what is different there from when it was saved."""

import hashlib
import os
from collections import Counter
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from omegaconf import DictConfig

from ..checkpoint import SafeCheckpointer
from ..checkpoint.model_file import other_classes
from ..config.preflight import dataset_names
from ..errors import UserError
from .processes import in_main_process

# What optimizers keep for every number of a parameter.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


class RunSettings:
    """Goes into checkpoints; knows those of the checkpoint that was loaded.

    Args:
        cfg: the config, its schedule fitted to the data.
        num_images: images of the training set.
        images: a `fingerprint` of the images of each split.
        parameters: names of the optimizer's parameters, group by group.
    """

    def __init__(
        self,
        cfg: DictConfig,
        num_images: int,
        images: dict[str, torch.Tensor] | None = None,
        parameters: list[list[str]] | None = None,
    ):
        self.in_epochs = cfg.train.epochs is not None
        self.now = {
            "images_a_step": cfg.dataloader.train.total_batch_size * cfg.train.accumulation_steps,
            "processes": comm.get_world_size(),
            "learning_rate": float(cfg.optimizer.lr),
            "max_iter": cfg.train.max_iter,
            "num_images": num_images,
        }
        self.images, self.parameters = images or {}, parameters or []
        self.saved: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {**self.now, "images": self.images, "parameters": self.parameters}

    def load_state_dict(self, state: dict[str, Any]):
        self.saved = {name: state[name] for name in self.now if name in state}

    def first_iteration(self, iteration: int) -> int:
        """Where a run goes on that was saved after `iteration`, counted from 0.

        A schedule in epochs goes on at the same epoch, whatever the images a step are now. No
        further than the end, after which a run may have been saved once more.
        """
        done = min(iteration + 1, self.saved.get("max_iter", iteration + 1))
        before, now = self.saved.get("images_a_step"), self.now["images_a_step"]
        if self.in_epochs and before is not None:
            done = done * before // now
        return min(done, self.now["max_iter"])

    def changes(self, first: int) -> list[str]:
        """A line for each difference: what it changes.

        Args:
            first: iteration at which training goes on.
        """
        pairs = {name: (self.saved[name], self.now[name]) for name in self.saved}
        changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        lines = []
        if "images_a_step" in changed:
            before, now = changed["images_a_step"]
            count = "the same epoch, which is" if self.in_epochs else "as many steps, that is"
            lines.append(
                f"{now} images a step instead of {before}: training goes on after {count} "
                f"iteration {first}, with the images that are next; the learning rate stays"
            )
        if "processes" in changed:
            before, now = changed["processes"]
            lines.append(
                f"{now} processes instead of {before}: images come in the same order, but are "
                "grouped by wide and tall for another number of processes"
            )
        if "learning_rate" in changed:
            before, now = changed["learning_rate"]
            lines.append(
                f"the learning rate of the run, {before:g}, stays: optimizer.lr={now:g} takes "
                "effect with train.init_checkpoint=FILE in another train.output_dir"
            )
        if "max_iter" in changed and "images_a_step" not in changed:
            before, now = changed["max_iter"]
            lines.append(f"{now} iterations instead of {before}: the schedule is stretched to them")
        if "num_images" in changed:
            before, now = changed["num_images"]
            lines.append(f"{now} training images instead of {before}: they come in another order")
        return lines


def fingerprint(records: list[dict], dataset: DictConfig) -> torch.Tensor:
    """Two numbers for each image, (N, 2) int64: of its name, and of its size and boxes.

    They depend neither on the order of images and boxes nor on where the images' folder is.

    Args:
        records: Detectron2's dictionaries of the images.
        dataset: the config's.
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
        rows.append((
            hashed(name.removeprefix(root)),
            hashed(repr((record.get("height"), record.get("width"), boxes))),
        ))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


def hashed(text: str) -> int:
    """The same 64 bits for the same text, on every machine."""
    digest = hashlib.blake2b(text.encode(errors="backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def other_images(before: torch.Tensor, now: torch.Tensor) -> str:
    """How many images differ between two fingerprints; nothing if none does."""
    old, new = (Counter(map(tuple, rows.tolist())) for rows in (before, now))
    gone, come = (
        Counter(name for name, _ in (one - other).elements())
        for one, other in ((old, new), (new, old))
    )
    changed = gone & come
    counts = {
        "new": (come - changed).total(),
        "missing": (gone - changed).total(),
        "with other boxes, classes or another size": changed.total(),
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def other_weights(saved: dict[str, torch.Tensor], model: torch.nn.Module) -> str:
    """The first weight of a model that has another shape in a checkpoint, or is not there."""
    found = [
        f"{name} is {tuple(saved[name].shape)} there and {tuple(ours.shape)} in the config"
        for name, ours in model.state_dict().items()
        if name in saved and saved[name].shape != ours.shape
    ]
    found += [f"{name} is not there" for name, _ in model.named_parameters() if name not in saved]
    return f"{found[0]}, and {len(found) - 1} more weights differ" if found[1:] else "".join(found)


def parameter_names(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module
) -> list[list[str]]:
    """Names of the optimizer's parameters, group by group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


def other_parameters(
    saved: dict[str, Any],
    saved_names: list[list[str]],
    optimizer: torch.optim.Optimizer,
    names: list[list[str]],
) -> str:
    """Why an optimizer cannot take a saved state; nothing if it can.

    Args:
        saved: the state.
        saved_names: names of its parameters, group by group; empty if the checkpoint lacks them.
        optimizer: of the run that is to go on.
        names: of its parameters, group by group.
    """
    groups = saved.get("param_groups") or [{}]
    ours, theirs = sum(names, []), sum(saved_names, [])
    if saved_names and set(ours) != set(theirs):
        only = sorted({*theirs} ^ {*ours}, key=(theirs + ours).index)
        places = ("there", "in the config")
        here, elsewhere = places if only[0] in theirs else reversed(places)
        return f"{only[0]} is trained {here} and not {elsewhere}, the first of {len(only)}"
    sizes, saved_sizes = ([len(group["params"]) for group in g] for g in (
        optimizer.param_groups, [{"params": [], **group} for group in groups]
    ))
    if sizes != saved_sizes or saved_names and saved_names != names:
        return (
            f"its optimizer has {sum(saved_sizes)} parameters in {len(saved_sizes)} groups, that "
            f"of the config {sum(sizes)} in {len(sizes)}, or in another order"
        )
    numbers = {k for k, v in optimizer.defaults.items() if not isinstance(v, (bool, type(None)))}
    lacking = sorted(numbers - groups[0].keys())
    if lacking:
        return f"it was trained with another optimizer, one without {lacking[0]}"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbered = [index for group in groups for index in group["params"]]
    for name, parameter, index in zip(ours, parameters, numbered):
        for key in MOMENTS:
            moment = saved.get("state", {}).get(index, {}).get(key)
            if moment is not None and moment.shape != parameter.shape:
                return (
                    f"its optimizer's {key} of {name} is {tuple(moment.shape)}, and the weight "
                    f"{tuple(parameter.shape)} in the config"
                )
    return ""


def check_resumable(
    path: str, checkpointer: SafeCheckpointer, settings: RunSettings, accept_changes: bool
):
    """Compare a checkpoint with the run that is to go on from it, before anything is restored.

    Raises:
        UserError: weights, optimizer, classes or data are others.
    """
    saved = checkpointer.read(path)
    run = saved.rest.get("run", {})
    impossible = other_weights(saved.weights, checkpointer.model)
    impossible = impossible or other_parameters(
        saved.rest["trainer"].get("optimizer", {}), run.get("parameters", []),
        checkpointer.checkpointables["trainer"].optimizer, settings.parameters,
    )
    unusual = [other_classes(saved.class_names, checkpointer.class_names)]
    for split, before in run.get("images", {}).items():
        if different := other_images(before, settings.images[split]):
            unusual.append(f"images of dataloader.{split}: {different}")
    found = "; ".join(filter(None, [impossible, *unusual]))
    if not found:
        return
    if accept_changes and not impossible:
        checkpointer.logger.warning(f"resuming {path} with train.accept_changes: {found}")
        return
    accept = "" if impossible else "Go on with train.accept_changes=true, or start "
    raise UserError(
        f"cannot resume {path}: {found}\n{accept or 'Start '}another run from its weights: "
        f"train.init_checkpoint={path} train.output_dir=NEW_FOLDER"
    )


def checkpoint_to_resume(
    checkpointer: SafeCheckpointer, settings: RunSettings, accept_changes: bool
) -> str:
    """The file from which a run goes on, as the main process finds it; nothing without one.

    Args:
        checkpointer: of the run, nothing of which has been restored.
        settings: of the run.
        accept_changes: whether classes and data may be others than those of the checkpoint.

    Raises:
        UserError: it cannot be read, does not fit, or a process does not see it.
    """

    def find() -> str:
        found = checkpointer.get_checkpoint_file()
        if found:
            check_resumable(found, checkpointer, settings, accept_changes)
        return found

    found = in_main_process(find)
    if found and not all(comm.all_gather(os.path.isfile(found))):
        raise UserError(
            f"not all machines see {found}: train.output_dir has to be a folder that they share"
        )
    return found
