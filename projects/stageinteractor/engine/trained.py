"""Weights of a run, for what comes after training."""

from omegaconf import DictConfig
from torch import nn

from ..checkpoint import SafeCheckpointer
from ..errors import UserError
from .hooks import ModelEMA


def load_trained(model: nn.Module, path: str, ema: DictConfig) -> nn.Module:
    """Fill a model from a checkpoint, with the moving average where that is switched on.

    Args:
        model: all of its weights have to be in the checkpoint.
        path: of the checkpoint.
        ema: ``train.model_ema`` of the config.

    Raises:
        UserError: no checkpoint, one that does not fit, or one without a moving average.
    """
    rest = SafeCheckpointer(model, strict=True).load(path, checkpointables=[])
    if not ema.enabled:
        return model
    if "model_ema" not in rest:
        raise UserError(f"{path} has no moving average: train.model_ema.enabled=false")
    average = ModelEMA(model, ema.decay)
    average.averaged.load_state_dict(rest["model_ema"])
    return average.module
