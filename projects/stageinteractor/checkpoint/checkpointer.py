"""Detectron2's checkpointer, made safe for files from strangers and able to read released ones."""

import os
from http.client import HTTPException
from typing import Any, Dict, NamedTuple, Sequence
from urllib.parse import urlparse

from detectron2.checkpoint import DetectionCheckpointer
from iopath.common.file_io import get_cache_dir
from torch import Tensor, nn

from ..errors import UserError
from .files import read_checkpoint, weights_of, write_checkpoint
from .imagenet import backbone_weights
from .released import convert_released, is_released, method_of

# What Detectron2's model zoo stands for, and other addresses that can be fetched.
MODEL_ZOO = "https://dl.fbaipublicfiles.com/detectron2/"
SCHEMES = ("http", "https", "detectron2")

CLASSIFIER = ".class_head.3."  # the layer of a stage's class head that has a row for every class


class SafeCheckpointer(DetectionCheckpointer):
    """Never executes what a file contains; converts released checkpoints as it loads them.

    Reads Detectron2's formats, the authors' released checkpoints, and ImageNet weights of
    torchvision, timm and Swin.

    Args:
        model, save_dir, checkpointables: see Detectron2.
        strict: refuse a file that does not fill every weight of the model.
        class_names: saved beside the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        strict: bool = False,
        class_names: Sequence[str] = (),
        **checkpointables,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.strict, self.class_names = strict, list(class_names)

    def save(self, name: str, **kwargs: Any):
        """Save as ``name``.pth, which is either whole or as it was before, see Detectron2."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), "class_names": self.class_names, **kwargs}
        data.update({key: part.state_dict() for key, part in self.checkpointables.items()})
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        write_checkpoint(data, path)
        self.tag_last_checkpoint(f"{name}.pth")

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        """Load a checkpoint, see Detectron2.

        Raises:
            UserError: no such file, no network to fetch it, a file that holds more than data, or
                one that does not fit.
        """
        scheme = path.partition("://")[0] if path and "://" in path else None
        if scheme is None:
            if path and not os.path.isfile(path.split("?")[0]):
                raise UserError(f"no checkpoint {path}: check train.init_checkpoint")
            return super().load(path, *args, **kwargs)
        if scheme not in SCHEMES:
            raise UserError(f"cannot fetch {path}: an address starts with {', '.join(SCHEMES)}")
        try:
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

    def _load_file(self, filename: str) -> Dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")):
            checkpoint = self._from_zoo(read_checkpoint(filename))
        else:
            checkpoint = super()._load_file(filename)
        weights = weights_of(checkpoint["model"], filename)
        checkpoint["model"] = self._translate(weights, filename)
        return checkpoint

    def _from_zoo(self, content: Dict[str, Any]) -> Dict[str, Any]:
        """The formats that Detectron2 itself would unpickle: its own, pycls's and Caffe2's."""
        if "model" in content:
            return content
        weights = content.get("model_state", content.get("blobs", content))
        weights = {k: v for k, v in weights.items() if not k.endswith("_momentum")}
        author = "pycls" if "model_state" in content else "Caffe2"
        return {"model": weights, "__author__": author, "matching_heuristics": True}

    def _torch_load(self, filename: str) -> Dict[str, Any]:
        loaded = read_checkpoint(filename)
        return {"model": loaded["state_dict"]} if "state_dict" in loaded else loaded

    def _translate(self, weights: Dict[str, Tensor], filename: str) -> Dict[str, Tensor]:
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

    def _load_model(self, checkpoint: Dict[str, Any]):
        incompatible = super()._load_model(checkpoint)
        # Counters of BatchNorm, which uses stored statistics anyway, are no weights.
        ours = [key for key in self.model.state_dict() if not key.endswith("num_batches_tracked")]
        lost = [key for key in ours if key in incompatible.missing_keys]
        anew = [entry for entry in incompatible.incorrect_shapes if CLASSIFIER in entry[0]]
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

    def _log_new_classifiers(self, incompatible: NamedTuple):
        """One line where the numbers of classes differ, instead of one for every weight."""
        anew = [entry for entry in incompatible.incorrect_shapes if CLASSIFIER in entry[0]]
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
