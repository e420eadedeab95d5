"""Detectron2's checkpointer, made safe for files from strangers and able to read released ones."""

import os
import pickle
from collections import OrderedDict
from typing import Any, Dict
from urllib.error import URLError

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir
from torch import nn

from ..errors import UserError
from .released import convert_released, is_released

# numpy 2 moved the function that rebuilds arrays; a file names its place in the writer's numpy.
REBUILD_ARRAY = np.zeros(1).__reduce__()[0]


def encode_bytes(text: str, _encoding: str) -> bytes:
    """Stands in for ``_codecs.encode``, through which old protocols write bytes."""
    return text.encode("latin1")


# All that a model-zoo pickle, a dictionary of numpy arrays, may refer to.
PICKLE_GLOBALS = {
    ("_codecs", "encode"): encode_bytes,
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): REBUILD_ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): REBUILD_ARRAY,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and numpy arrays, and refuses everything else."""

    def find_class(self, module: str, name: str):
        if (module, name) not in PICKLE_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return PICKLE_GLOBALS[module, name]


class SafeCheckpointer(DetectionCheckpointer):
    """Never executes what a file contains; converts released checkpoints as it loads them.

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
        torch.save(data, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
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
        try:
            if filename.endswith(".pkl"):
                checkpoint = self._pickle_load(filename)
            else:
                checkpoint = super()._load_file(filename)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"cannot load {filename}: {reason}\n"
                "Only tensors and arrays are loaded, never code. Is the file complete?"
            ) from error
        if is_released(checkpoint["model"]):
            self.logger.info(f"{filename} is a released StageInteractor checkpoint: converting")
            checkpoint["model"] = convert_released(checkpoint["model"])
        return checkpoint

    def _pickle_load(self, filename: str) -> Dict[str, Any]:
        with PathManager.open(filename, "rb") as file:
            data = ArrayUnpickler(file, encoding="latin1").load()
        if "model" in data:  # Detectron2's model zoo
            return data
        blobs = data.get("blobs", data)  # Caffe2's
        weights = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}

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

    def _torch_load(self, filename: str) -> Dict[str, Any]:
        loaded = torch.load(filename, map_location="cpu", weights_only=True)
        return {"model": loaded["state_dict"]} if "state_dict" in loaded else loaded
