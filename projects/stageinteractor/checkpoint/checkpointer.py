"""Detectron2's checkpointer, made safe for files from strangers and able to read released ones."""

import glob
import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from ..errors import TO_RESUME, UserError
from ..files import UNFINISHED, write_durably
from .imagenet import backbone_weights
from .model_file import ModelFile
from .released import convert_released, is_released, method_of
from .weight_files import write_checkpoint

LAST = "last_checkpoint"  # the file in which Detectron2 notes the last one

CLASSIFIER = ".class_head.3."  # the layer of a stage's class head that has a row for every class


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
        self._file: ModelFile | None = None  # read and not loaded yet
        self._starts_anew = False  # loads weights, but does not continue their run
        if any(weight.is_meta for weight in model.parameters()):
            self.logger = logging.Logger("silent", logging.CRITICAL)

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
        path, self._file = os.path.join(self.save_dir, f"{name}.pth"), None
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
        """The last whole checkpoint of the folder's run, or "" if there is none.

        It is the one of the highest iteration, which a run that was killed may not have noted; or
        the noted one, if a person noted it. `read` and `load` do not read it again.

        Raises:
            UserError: there are checkpoints, but a run can continue from none of them.
        """
        files, noted = self._checkpoints(), self.noted_checkpoint()
        if not files:
            return ""
        first = last = self._resumable(noted) if noted else None
        if not (first and self._is_noted_by_a_person()):
            # Files whose names say that they are earlier need not be read.
            least = f"model_{first.iteration:07d}.pth" if first else ""
            for path in files:
                if path != noted and os.path.basename(path) > least:
                    found = self._resumable(path)
                    if found and (last is None or found.iteration > last.iteration):
                        last = found
                    found = None  # a checkpoint that is not needed leaves memory before the next
        if last is None:
            raise UserError(
                f"no checkpoint in {self.save_dir} can be read: start again with another "
                "train.output_dir, from weights with train.init_checkpoint=FILE"
            )
        if first and last is not first:
            self.logger.warning(
                f"{last.path} is later than {noted}, which {LAST} names: resuming from the later "
                "one; to go back, move it elsewhere"
            )
        self._file = last
        return last.path

    def _resumable(self, path: str) -> ModelFile | None:
        """A checkpoint that a run can continue from; None, with a warning, if it is not one."""
        try:
            file = ModelFile.read(path)
        except UserError:
            file = None
        if file is None or file.iteration is None:
            self.logger.warning(
                f"{path} is damaged or was not saved by a run: looking for another checkpoint"
            )
            return None
        return file

    def read(self, path: str) -> ModelFile:
        """A checkpoint, see `ModelFile.read`. What `get_checkpoint_file` found is kept."""
        if self._file is None or self._file.path != path:
            self._file = ModelFile.read(path)
        return self._file

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

    def load(
        self, path: str | ModelFile, checkpointables: list[str] | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint, see Detectron2; a `ModelFile` is not read again.

        Weights alone, with ``checkpointables=[]``, may be of other classes, see `_rows_by_name`.

        Raises:
            UserError: the file is missing, cannot be fetched or read, or does not fit.
        """
        if path:
            self._file = path if isinstance(path, ModelFile) else self.read(path)
            path = self._file.local
        self._starts_anew = checkpointables == [] and not self.strict
        return super().load(path, checkpointables)

    def _load_file(self, filename: str) -> dict[str, Any]:
        file, self._file = self._file, None  # so that its memory can be freed
        weights = dict(self._translate(file.weights, file.path))
        if self._starts_anew and file.class_names and self.class_names:
            weights |= self._rows_by_name(weights, file.class_names)
        content = {**file.rest, "model": weights}
        if "class_names" in content:
            content["class_names"] = file.class_names
        if not file.weights:
            content["matching_heuristics"] = False  # Detectron2 cannot match nothing
        return content

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

    def _rows_by_name(
        self, weights: dict[str, Tensor], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Classifiers of this model in which classes have the rows of the same name in a file.

        Args:
            weights: of the file.
            names: of the file's classes.

        Returns:
            by name, those that the file has; nothing if its classes are the same. The rows of other
            classes are those of this model.
        """
        if list(names) == self.class_names:
            return {}
        same = [name for name in self.class_names if name in names]
        here, there = ([every.index(name) for name in same] for every in (self.class_names, names))
        fitted = {}
        for key, own in self.model.state_dict().items():
            theirs = weights.get(key)
            if CLASSIFIER in key and theirs is not None and len(theirs) == len(names) \
                    and theirs.shape[1:] == own.shape[1:] and len(own) == len(self.class_names):
                fitted[key] = own.clone()
                fitted[key][here] = theirs[there].to(own)
        if fitted:
            some = ", ".join(same[:5]) + (", ..." if len(same) > 5 else "")
            self.logger.info(
                f"the checkpoint has other classes: the classifiers of the stages keep {len(same)} "
                f"of {len(self.class_names)} by name ({some or 'none'}), and the others start anew"
            )
        return fitted

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
                "no weight of the checkpoint fits this model in name and shape: is the config the "
                "right one?"
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
        rest = f"and so do {others} other weights" if others else "everything else is loaded"
        self.logger.warning(
            f"the checkpoint has {theirs[0]} classes, this model {ours[0]}: the classifiers of its "
            f"stages start anew, {rest}"
        )
