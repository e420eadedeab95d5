"""Detectron2's checkpointer, made safe for files from strangers and able to read released ones."""

import os
from typing import Any, Dict
from urllib.error import URLError

from detectron2.checkpoint import DetectionCheckpointer
from iopath.common.file_io import get_cache_dir
from torch import Tensor, nn

from ..errors import UserError
from .files import read_checkpoint, write_checkpoint
from .imagenet import backbone_weights
from .released import convert_released, is_released, method_of


class SafeCheckpointer(DetectionCheckpointer):
    """Never executes what a file contains; converts released checkpoints as it loads them.

    Reads Detectron2's formats, the authors' released checkpoints, and ImageNet weights of
    torchvision, timm and Swin.

    Args:
        model, save_dir, checkpointables: see Detectron2.
        strict: refuse a file that does not fill every weight of the model.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, strict=False, **checkpointables):
        super().__init__(model, save_dir, **checkpointables)
        self.strict = strict

    def save(self, name: str, **kwargs: Any):
        """Save as ``name``.pth, which is either whole or as it was before, see Detectron2."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), **kwargs}
        data.update({key: part.state_dict() for key, part in self.checkpointables.items()})
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        write_checkpoint(data, path)
        self.tag_last_checkpoint(f"{name}.pth")

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        """Load a checkpoint, see Detectron2.

        Raises:
            UserError: no such file, no network to fetch it, a file that holds more than data, or
                one that does not fit if ``strict``.
        """
        if path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            raise UserError(f"no checkpoint {path}: check train.init_checkpoint")
        try:
            return super().load(path, *args, **kwargs)
        except URLError as error:
            raise UserError(
                f"cannot fetch {path} into {get_cache_dir()}: {error.reason}\n"
                "Without a network, get the file elsewhere and set train.init_checkpoint=FILE"
            ) from error

    def _load_file(self, filename: str) -> Dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")):
            checkpoint = self._from_zoo(read_checkpoint(filename))
        else:
            checkpoint = super()._load_file(filename)
        checkpoint["model"] = self._translate(checkpoint["model"], filename)
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
        lost = [*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)]
        # Counters of BatchNorm, which uses stored statistics anyway, are no weights.
        lost = [key for key in lost if not key.endswith("num_batches_tracked")]
        if self.strict and lost:
            raise UserError(
                f"the checkpoint does not fit the config: {len(lost)} weights, {lost[0]} the first "
                "of them, are missing or have another shape"
            )
        return incompatible
