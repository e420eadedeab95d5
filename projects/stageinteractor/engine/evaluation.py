"""Evaluating a model on the test set."""

from collections.abc import Callable, Iterable

from detectron2.config import instantiate
from detectron2.evaluation import inference_on_dataset
from omegaconf import DictConfig
from torch import nn

from ..config.building import load_dataset
from ..data import ReadableBatches
from ..errors import UserError
from ..inference.opening import open_model
from .failures import explain_out_of_memory
from .training_parts import build_loader, compile_if_requested


def evaluate(
    cfg: DictConfig, model: nn.Module, loader: Iterable, before_batch: Callable = lambda: None
) -> dict:
    """Metrics of the model on the batches of a test loader.

    Args:
        before_batch: called before each batch.

    Raises:
        UserError: an image cannot be read, or memory runs out.
    """
    batches = ReadableBatches(loader, 4 if cfg.train.fast_dev_run.enabled else None)
    with explain_out_of_memory(batches.current, is_training=False):
        return inference_on_dataset(
            model,
            batches,
            instantiate(cfg.dataloader.evaluator),
            callbacks={"before_inference": before_batch},
        )


def evaluate_only(cfg: DictConfig) -> dict:
    """Metrics of ``train.init_checkpoint``, or of its moving average if that is switched on.

    It may be an exported file. A .pt2 is loaded if ``train.trust_program`` is set.

    Raises:
        UserError: there is no checkpoint, it does not fit, or it has no moving average.
    """
    if not cfg.train.init_checkpoint:
        raise UserError("--eval-only needs a checkpoint: train.init_checkpoint=FILE")
    loader = build_loader(cfg, "test", load_dataset(cfg, "test"))
    trusted = bool(cfg.train.get("trust_program"))  # which older configs lack
    model, *_ = open_model(cfg.train.init_checkpoint, cfg, trusted=trusted)
    compile_if_requested(cfg, model)
    return evaluate(cfg, model, loader)
