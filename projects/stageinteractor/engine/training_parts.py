"""The parts of a training run, built from its config."""

from collections.abc import Iterable

import torch
from detectron2.config import instantiate
from detectron2.engine.defaults import create_ddp_model
from detectron2.solver import LRMultiplier
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..config.building import build_model, explain_misfits
from ..data import NameUnreadable, begin_loading
from ..errors import UserError
from .trainer import Trainer


def build_loader(cfg: DictConfig, split: str, dataset: list[dict]) -> Iterable:
    """The data loader of ``train`` or ``test`` over its data set.

    Raises:
        UserError: its options do not fit together.
    """
    options = {**cfg.dataloader[split], "dataset": dataset}
    if split == "test":
        options["mapper"] = NameUnreadable(instantiate(options["mapper"]))
    elif cfg.train.device.startswith("cuda"):
        options["pin_memory"] = True  # otherwise copying an image waits for the step before
    with explain_misfits(f"dataloader.{split}"):
        loader = instantiate(options)
    if split == "test":
        loader.worker_init_fn = begin_loading
    return loader


def compile_if_requested(cfg: DictConfig, model: nn.Module):
    """Compile the decoder's stages with ``train.compile``. Raises UserError if there are none."""
    if cfg.train.compile.enabled:
        if not hasattr(getattr(model, "decoder", None), "compile_stages"):
            raise UserError("train.compile.enabled=true: this model has no stages to compile")
        model.decoder.compile_stages()


def build_distributed_model(cfg: DictConfig) -> nn.Module:
    """The model on its device, wrapped in DistributedDataParallel if there are several processes.

    Raises:
        UserError: its sizes do not fit together, or it has nothing to compile.
    """
    model = build_model(cfg)
    compile_if_requested(cfg, model)
    ddp = OmegaConf.to_container(cfg.train.ddp)
    if cfg.train.device != "cuda":
        ddp["device_ids"] = None
    return create_ddp_model(model, **ddp)


def build_trainer(cfg: DictConfig, model: nn.Module, loader: Iterable) -> Trainer:
    """The trainer of a model, with its optimizer.

    Raises:
        UserError: the optimizer does not take its arguments.
    """
    options = cfg.train
    cfg.optimizer.params.model = model
    with explain_misfits("optimizer"):
        optimizer = instantiate(cfg.optimizer)
    for group in optimizer.param_groups:
        # Checkpoints hold plain values only, no lists of the config.
        group.update({k: tuple(v) for k, v in group.items() if isinstance(v, ListConfig)})
    return Trainer(
        model,
        loader,
        optimizer,
        amp_dtype=getattr(torch, options.amp.dtype) if options.amp.enabled else None,
        accumulation_steps=options.accumulation_steps,
        clip_grad=options.clip_grad.params if options.clip_grad.enabled else None,
        max_skipped_steps=options.max_skipped_steps,
    )


def build_lr_multiplier(cfg: DictConfig) -> LRMultiplier:
    """The schedule of the learning rate. Raises UserError if its values do not fit together."""
    with explain_misfits("lr_multiplier"):
        return instantiate(cfg.lr_multiplier)
