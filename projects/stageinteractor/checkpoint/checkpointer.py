"""Detectron2's checkpointer, made safe for files from strangers and able to read released ones."""

import glob
import logging
import os
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.parse import urlparse

from detectron2.checkpoint import DetectionCheckpointer
from iopath.common.file_io import get_cache_dir
from torch import Tensor, nn

from ..errors import TO_RESUME, UserError
from ..files import UNFINISHED, write_durably
from .imagenet import backbone_weights
from .released import convert_released, is_released, method_of
from .weight_files import (
    class_names_of,
    read_checkpoint,
    verify_download,
    weights_of,
    write_checkpoint,
    zoo_checkpoint,
)

# What Detectron2's model zoo stands for, and other addresses that can be fetched.
MODEL_ZOO = "https://dl.fbaipublicfiles.com/detectron2/"
SCHEMES = ("https", "detectron2")

LAST = "last_checkpoint"  # the file in which Detectron2 notes the last one

CLASSIFIER = ".class_head.3."  # the layer of a stage's class head that has a row for every class


def iteration_of(path: str) -> int | None:
    """The iteration after which a run has saved a checkpoint, or None if it cannot go on there."""
    try:
        content = read_checkpoint(path)
    except (OSError, UserError):
        return None
    return content.get("iteration") if "trainer" in content else None


def why_missing(path: str, advice: str = "check the path") -> str:
    """Why there is no checkpoint at a path, which is not a file, and what to do about it.

    Args:
        path: of a folder, or of nothing; of a folder with checkpoints, the best one is named.
        advice: for a path with nothing there.
    """
    if not os.path.isdir(path):
        return f"no checkpoint {path}: {advice}"
    names = sorted(map(os.path.basename, glob.glob(os.path.join(glob.escape(path), "*.pth"))))
    best = [name for name in ("model_best.pth", "model_final.pth", *names[-1:]) if name in names]
    if not best:
        return f"{path} is a folder without checkpoints: give the file of one"
    return f"{path} is a folder: give a file in it, such as {os.path.join(path, best[0])}"


def other_classifiers(incompatible: NamedTuple) -> list[tuple]:
    """Entries of ``incorrect_shapes`` that are classifiers of another number of classes."""
    return [
        (key, theirs, ours) for key, theirs, ours in incompatible.incorrect_shapes
        if CLASSIFIER in key and theirs[0] != ours[0]
    ]


class SafeCheckpointer(DetectionCheckpointer):
    """Never executes what a file contains; converts released checkpoints as it loads them.

    Reads Detectron2's formats, the authors' released checkpoints, and ImageNet weights of
    torchvision, timm and Swin.

    Args:
        model, save_dir, checkpointables: see Detectron2. A model on "meta" is only compared with
            what it loads, by names and shapes, without a word in the log.
        strict: refuse a file that does not fill every weight of the model.
        class_names, config: saved beside the weights, see config/portable_config.py.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        strict: bool = False,
        class_names: Sequence[str] = (),
        config: str = "",
        **checkpointables,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.strict, self.class_names, self.config = strict, list(class_names), config
        self.device = "cpu"
        if any(weight.is_meta for weight in model.parameters()):
            self.device, self.logger = "meta", logging.Logger("silent", logging.CRITICAL)

    def save(self, name: str, **kwargs: Any):
        """Save as ``name``.pth, which is either whole or as it was before, see Detectron2.

        Raises:
            UserError: it cannot be written; what was saved before is still there.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {
            "model": self.model.state_dict(),
            "class_names": self.class_names,
            "config": self.config,
            **kwargs,
        }
        data.update({key: part.state_dict() for key, part in self.checkpointables.items()})
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            write_checkpoint(data, path)
            self.tag_last_checkpoint(f"{name}.pth")
        except OSError as error:
            last = self.get_checkpoint_file()
            advice = f"go on from {last} with {TO_RESUME}" if last else "start again"
            raise UserError(
                f"cannot save {path}: {error.strerror or error}\n"
                f"Make room or set another train.output_dir, then {advice}"
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str):
        """Note which checkpoint is the last one, see Detectron2. The note is whole or as before."""
        note = os.path.join(self.save_dir, LAST)
        write_durably(note, lambda file: file.write(last_filename_basename.encode()))

    def numbered_checkpoints(self) -> list[str]:
        """The periodic checkpoints of the folder, in the order of their iterations."""
        return sorted(self._files("model_" + "[0-9]" * 7 + ".pth"))

    def remove_half_written(self):
        """Remove what an interrupted save has left of its file."""
        for name in ("model_*.pth", LAST):
            for path in self._files(name + UNFINISHED):
                os.remove(path)

    def has_checkpoint(self) -> bool:
        """Whether the folder holds checkpoints of a run, whole or not."""
        return bool(self._checkpoints())

    def get_checkpoint_file(self) -> str:
        """The last whole checkpoint of the folder's run, or nothing.

        It is the one of the highest iteration, which may not have been noted any more; or the noted
        one, if a person has noted it.

        Raises:
            UserError: there are checkpoints, none of which can be continued.
        """
        files, noted = self._checkpoints(), self.noted_checkpoint()
        if not files:
            return ""
        whole = self._iterations([noted]) if noted else {}
        if not (whole and self._is_noted_by_a_person()):
            # What its name says is earlier need not be read.
            first = f"model_{whole[noted]:07d}.pth" if whole else ""
            names = {path: os.path.basename(path) for path in files if path != noted}
            whole.update(self._iterations([path for path in names if names[path] > first]))
        if not whole:
            raise UserError(
                f"no checkpoint in {self.save_dir} can be read: start again with another "
                "train.output_dir, from weights with train.init_checkpoint=FILE"
            )
        last = max(whole, key=lambda path: (whole[path], path == noted))
        if noted in whole and last != noted:
            self.logger.warning(
                f"{last} is later than {noted}, which {LAST} names: going on from the later one; "
                "to go back, move it elsewhere"
            )
        return last

    def _iterations(self, paths: Sequence[str]) -> dict[str, int]:
        """After which iteration each was saved; those that a run cannot continue are omitted."""
        found = {path: iteration_of(path) for path in paths}
        for path in paths:
            if found[path] is None:
                self.logger.warning(
                    f"{path} is damaged or not of a run: looking for another checkpoint"
                )
                del found[path]
        return found

    def _is_noted_by_a_person(self) -> bool:
        """Whether the note ends its line, as an editor or echo does and no checkpointer."""
        with open(os.path.join(self.save_dir, LAST), errors="replace") as file:
            return file.read().endswith("\n")

    def noted_checkpoint(self) -> str:
        """The checkpoint that is noted as the last one; nothing if there is no such file."""
        note = os.path.join(self.save_dir, LAST)
        if not os.path.isfile(note):
            return ""
        with open(note, errors="replace") as file:
            path = os.path.join(self.save_dir, os.path.basename(file.read().strip("\0 \n")))
        return path if os.path.isfile(path) else ""

    def _checkpoints(self) -> list[str]:
        """Files of checkpoints, as they are named here, and the noted one."""
        files = {*self.numbered_checkpoints(), *self._files("model_final.pth")}
        return sorted(files | {*self._files("model_best.pth"), self.noted_checkpoint()} - {""})

    def _files(self, pattern: str) -> list[str]:
        return glob.glob(os.path.join(glob.escape(self.save_dir), pattern))

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """Load a checkpoint, see Detectron2.

        Raises:
            UserError: no such file, no network to fetch it, an address that anybody can answer, or
                a file that is not the one its name promises, holds more than data or does not fit.
        """
        scheme = path.partition("://")[0] if path and "://" in path else None
        if scheme is None:
            if path and not os.path.isfile(path.split("?")[0]):
                raise UserError(why_missing(path, "check train.init_checkpoint"))
            return super().load(path, *args, **kwargs)
        if scheme == "http":
            raise UserError(
                f"cannot fetch {path}: with http, anybody on the way can change the file\n"
                "Use https, or fetch it yourself and set train.init_checkpoint=FILE"
            )
        if scheme not in SCHEMES:
            raise UserError(f"cannot fetch {path}: an address starts with {', '.join(SCHEMES)}")
        try:
            address = urlparse(path)._replace(query="").geturl()
            verify_download(self.path_manager.get_local_path(address))
            return super().load(path, *args, **kwargs)
        except (OSError, HTTPException) as error:
            url = path.replace("detectron2://", MODEL_ZOO)
            place = os.path.join(get_cache_dir(), urlparse(url).path.lstrip("/"))
            known_as = path if path == url else f"{path} ({url})"
            reason = getattr(error, "reason", error) or type(error).__name__
            raise UserError(
                f"cannot fetch {known_as}: {reason}\n"
                f"Without a network, get the file elsewhere and save it as {place} "
                "or set train.init_checkpoint=FILE"
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")):
            checkpoint = zoo_checkpoint(read_checkpoint(filename, self.device), filename)
        else:
            checkpoint = super()._load_file(filename)
        weights = weights_of(checkpoint["model"], filename)
        checkpoint["model"] = self._translate(weights, filename)
        checkpoint["class_names"] = class_names_of(checkpoint, filename)
        if not weights:
            checkpoint["matching_heuristics"] = False  # Detectron2 cannot match nothing
        return checkpoint

    def _torch_load(self, filename: str) -> dict[str, Any]:
        loaded = read_checkpoint(filename, self.device)
        return {"model": loaded["state_dict"]} if "state_dict" in loaded else loaded

    def _translate(self, weights: dict[str, Tensor], filename: str) -> dict[str, Tensor]:
        """Weights under this model's names, if they are in a format that is known to differ."""
        if is_released(weights):
            converted = convert_released(weights)
            self.logger.info(
                f"{filename} is a released {method_of(converted.weights)} checkpoint: "
                f"{len(converted.weights)} entries converted, "
                f"{len(converted.dropped)} without effect left out"
            )
            kind, weights, left_out = "released", converted.weights, converted.unplaced
        else:
            fitted = backbone_weights(weights, self.model.state_dict())
            if fitted is None:
                return weights
            kind, (weights, left_out) = "ImageNet", fitted
            self.logger.info(f"{filename} holds ImageNet weights: {len(weights)} for the backbone")
        if left_out:
            names = ", ".join(left_out[:4]) + (", ..." if len(left_out) > 4 else "")
            self.logger.warning(f"{len(left_out)} {kind} entries have no place here: {names}")
        return weights

    def _load_model(self, checkpoint: dict[str, Any]):
        incompatible = super()._load_model(checkpoint)
        # Counters of BatchNorm, which uses stored statistics anyway, are no weights.
        ours = [key for key in self.model.state_dict() if not key.endswith("num_batches_tracked")]
        lost = [key for key in ours if key in incompatible.missing_keys]
        anew = other_classifiers(incompatible)
        if self.strict and anew:
            raise UserError(
                f"the checkpoint has {anew[0][1][0]} classes, the config {anew[0][2][0]}: "
                "is it of another data set?"
            )
        if self.strict and lost:
            raise UserError(
                f"the checkpoint does not fit the config: {len(lost)} weights, {lost[0]} the first "
                "of them, are missing or have another shape"
            )
        if len(lost) == len(ours):
            raise UserError(
                "the checkpoint has nothing for this model: none of its names and shapes is known"
            )
        self._log_new_classifiers(incompatible)
        return incompatible

    def _log_incompatible_keys(self, incompatible: NamedTuple):
        """One line for each kind of misfit, where Detectron2 lists all names; these are for debug.

        A file that has the backbone alone, as ImageNet's do, is no misfit.
        """
        wrong = {
            key: f"{key} {tuple(theirs)} instead of {tuple(ours)}"
            for key, theirs, ours in incompatible.incorrect_shapes
        }
        missing = [key for key in incompatible.missing_keys if key not in wrong]
        has_backbone = not any(key.startswith("backbone.") for key in [*missing, *wrong])
        others = [key for key in self.model.state_dict() if not key.startswith("backbone.")]
        is_backbone_alone = has_backbone and others and {*missing} == {*others}
        level = logging.INFO if is_backbone_alone else logging.WARNING
        for what, names in (
            ("weights are not in the checkpoint and start anew", missing),
            ("weights have another shape in the checkpoint and start anew", list(wrong.values())),
            ("weights of the checkpoint have no place in this model", incompatible.unexpected_keys),
        ):
            if names:
                some = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
                self.logger.log(level, f"{len(names)} {what}: {some}")
                self.logger.debug("\n".join([f"{len(names)} {what}:", *names]))

    def _log_new_classifiers(self, incompatible: NamedTuple):
        """One line where the numbers of classes differ, instead of one for every weight."""
        anew = other_classifiers(incompatible)
        if not anew:
            return
        for key, theirs, ours in anew:
            incompatible.incorrect_shapes.remove((key, theirs, ours))
            incompatible.missing_keys.remove(key)
        others = len(incompatible.missing_keys)
        rest = f"{others} weights besides too" if others else "everything else is loaded"
        self.logger.warning(
            f"the checkpoint has {theirs[0]} classes, this model {ours[0]}: the classifiers of its "
            f"stages start anew, {rest}"
        )
