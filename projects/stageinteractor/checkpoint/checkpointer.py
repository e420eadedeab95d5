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
    """Never executes what a file contains; converts released checkpoints as it loads them."""

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        """Load a checkpoint, see Detectron2.

        Raises:
            UserError: no such file, no network to fetch it, or a file that holds more than data.
        """
        if path and "://" not in path and not os.path.isfile(path):
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

    def _torch_load(self, filename: str) -> Dict[str, Any]:
        loaded = torch.load(filename, map_location="cpu", weights_only=True)
        return {"model": loaded["state_dict"]} if "state_dict" in loaded else loaded
