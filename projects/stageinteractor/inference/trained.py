"""Weights of a run, for what comes after training."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.optim.swa_utils import AveragedModel

from ..checkpoint import SafeCheckpointer
from ..errors import UserError


def load_trained(
    model: nn.Module, path: str, ema: DictConfig, class_names: Sequence[str]
) -> nn.Module:
    """Fill a model from a checkpoint, with the moving average where that is switched on.

    Args:
        model: all of its weights have to be in the checkpoint.
        path: of the checkpoint.
        ema: ``train.model_ema`` of the config.
        class_names: of the data; those of the checkpoint, if it has any, have to be the same.

    Raises:
        UserError: no checkpoint, one that does not fit, or one without a moving average.
    """
    rest = SafeCheckpointer(model, strict=True).load(path, checkpointables=[])
    different = other_classes(rest, class_names)
    if different:
        raise UserError(f"{path} {different}")
    if not ema.enabled:
        return model
    if "model_ema" not in rest:
        raise UserError(f"{path} has no moving average: train.model_ema.enabled=false")
    average = AveragedModel(model)
    try:
        average.load_state_dict(rest["model_ema"])
    except (AttributeError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: its moving average does not fit the config") from error
    return average.module


def fold_norms(model: nn.Module) -> nn.Module:
    """Make a model faster for inference alone, and return it; results differ by rounding.

    Batch norms that Detectron2's convolutions apply become part of their weights, which a processor
    reads best with channels last.
    """
    for module in model.modules():
        norm = getattr(module, "norm", None)
        if isinstance(module, Conv2d) and isinstance(norm, (_BatchNorm, FrozenBatchNorm2d)):
            module.weight, module.bias = fuse_conv_bn_weights(
                module.weight, module.bias,
                norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias,
            )
            module.norm = None
            module.to(memory_format=torch.channels_last)
    return model


def other_classes(checkpoint: dict[str, Any], class_names: Sequence[str]) -> str:
    """How the classes of a checkpoint differ from those of the data; nothing if they do not."""
    theirs = checkpoint.get("class_names", [])
    if not theirs or not class_names or list(theirs) == list(class_names):
        return ""
    pairs = zip_longest(theirs, class_names)
    number, (old, new) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"was trained for other classes: number {number} is {old} there and {new} in the data"
