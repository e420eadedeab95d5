#!/usr/bin/env python
"""Train and evaluate a model described by a LazyConfig file, on Detectron2's engine.

    python tools/train_net.py --config-file FILE [--num-gpus N] [--resume] [key=value ...]
    python tools/train_net.py --config-file FILE --eval-only train.init_checkpoint=FILE
    torchrun --nproc-per-node N tools/train_net.py --config-file FILE

Without a GPU, --num-gpus N starts N processes on the CPU.
"""

import argparse
import itertools
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Iterable, List, Tuple

# Idle OpenMP threads spin for a while; with a second process on the same cores, the default while
# makes a step up to ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# Detectron2 still scripts a function as it is imported.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)  # its zoo

import torch
import torch.distributed as dist
from detectron2.config import instantiate
from detectron2.engine import default_argument_parser, default_setup, hooks, launch
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.multiprocessing import ProcessExitedException

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from projects.stageinteractor.checkpoint import SafeCheckpointer
from projects.stageinteractor.engine import (
    BestCheckpointer,
    ModelEMA,
    PredictionPictures,
    RunSummary,
    Trainer,
    check_classes,
    check_dataset,
    check_options,
    class_names,
    default_writers,
    fit_schedule,
    fold_norms,
    keep_freed_memory,
    load_config,
    load_trained,
    num_classes_key,
    other_classes,
    select_device,
    settle_dataset,
    settle_schedule,
    summarize_evaluation,
)
from projects.stageinteractor.errors import UserError


def setup(args) -> Tuple[DictConfig, str]:
    """Load and check the config and the data set.

    Returns:
        the config, and remarks on the data set, if there are any.

    Raises:
        UserError: the config or something it names is not usable.
    """
    cfg = load_config(args.config_file, args.opts)
    given = {text.partition("=")[0].lstrip("+") for text in args.opts}
    settle_schedule(cfg, given)
    remarks = settle_dataset(cfg, given, training=not args.eval_only)
    cfg.train.device = select_device(cfg.train.device)
    keep_freed_memory()
    # What is no training run of its own stays out of the way of the one in the output folder.
    if args.eval_only:
        cfg.train.output_dir = os.path.join(cfg.train.output_dir, "eval")
    elif cfg.train.fast_dev_run.enabled:
        cfg.train.output_dir = os.path.join(cfg.train.output_dir, "fast_dev_run")
        cfg.train.update(epochs=None, max_iter=4, eval_period=2, log_period=1)
        cfg.train.checkpointer.period = 2
    check_options(cfg)
    for split in ("test",) if args.eval_only else ("train", "test"):
        check_dataset(cfg.dataloader[split].dataset)
    return cfg, remarks


def load_dataset(cfg: DictConfig, split: str) -> List[dict]:
    """Detectron2's dictionaries of the images of ``train`` or ``test``."""
    dataset = instantiate(cfg.dataloader[split].dataset)
    key = num_classes_key(cfg)
    check_classes(cfg.dataloader[split].dataset, key, OmegaConf.select(cfg, key))
    return dataset


def build_loader(cfg: DictConfig, split: str, dataset: List[dict]) -> Iterable:
    """The data loader of ``train`` or ``test`` over its data set."""
    options = {**cfg.dataloader[split], "dataset": dataset}
    if split == "train" and cfg.train.device.startswith("cuda"):
        options["pin_memory"] = True  # else the copy of an image waits for the step before
    return instantiate(options)


def build_model(cfg: DictConfig) -> nn.Module:
    """The model on its device, wrapped for several processes if there are any.

    Raises:
        UserError: sizes that do not fit together, or nothing to compile.
    """
    try:
        model = instantiate(cfg.model).to(cfg.train.device)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    if cfg.train.compile.enabled:
        if not hasattr(getattr(model, "decoder", None), "compile_stages"):
            raise UserError("train.compile.enabled=true: this model has no stages to compile")
        model.decoder.compile_stages()
    ddp = OmegaConf.to_container(cfg.train.ddp)
    if cfg.train.device != "cuda":
        ddp["device_ids"] = None
    return create_ddp_model(model, **ddp)


def build_optimizer(optimizer: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a model."""
    optimizer.params.model = model
    built = instantiate(optimizer)
    for group in built.param_groups:
        # A list of the config would end up in checkpoints, which hold plain values only.
        group.update({k: tuple(v) for k, v in group.items() if isinstance(v, ListConfig)})
    return built


def evaluate(cfg: DictConfig, model: nn.Module, loader: Iterable) -> dict:
    """Metrics of the model on the batches of a test loader."""
    if cfg.train.fast_dev_run.enabled:
        loader = list(itertools.islice(loader, 4))
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    print_csv_format(results)
    return results


def evaluate_only(cfg: DictConfig) -> dict:
    """Evaluate ``train.init_checkpoint``, its moving average where that is switched on.

    Raises:
        UserError: no checkpoint, one that does not fit, or one without a moving average.
    """
    if not cfg.train.init_checkpoint:
        raise UserError("--eval-only needs a checkpoint: train.init_checkpoint=FILE")
    dataset = load_dataset(cfg, "test")
    loader = build_loader(cfg, "test", dataset)
    names = class_names(cfg.dataloader.test.dataset)
    model = load_trained(
        build_model(cfg), cfg.train.init_checkpoint, cfg.train.model_ema, names
    )
    results = evaluate(cfg, fold_norms(model), loader)
    if comm.is_main_process():
        has_truth = any(record.get("annotations") for record in dataset)
        summarize_evaluation(cfg.train.output_dir, cfg.dataloader.test.dataset, has_truth)
    return results


def train(cfg: DictConfig, resume: bool):
    """Train to ``train.max_iter``, from the last checkpoint of the output folder if ``resume``.

    Raises:
        UserError: the output folder holds a run, and this is not to resume it.
    """
    options, is_main = cfg.train, comm.is_main_process()
    holds_run = os.path.exists(os.path.join(options.output_dir, "last_checkpoint"))
    if holds_run and not resume and not options.fast_dev_run.enabled:
        raise UserError(
            f"{options.output_dir} holds a run: continue it with --resume, or start another one "
            "with train.output_dir=FOLDER"
        )
    dataset = load_dataset(cfg, "train")
    fit_schedule(cfg, len(dataset))
    train_loader = build_loader(cfg, "train", dataset)
    test_dataset = load_dataset(cfg, "test")
    test_loader = build_loader(cfg, "test", test_dataset)
    model = build_model(cfg)
    trainer = Trainer(
        model,
        train_loader,
        build_optimizer(cfg.optimizer, model),
        amp_dtype=getattr(torch, options.amp.dtype) if options.amp.enabled else None,
        accumulation_steps=options.accumulation_steps,
        clip_grad=options.clip_grad.params if options.clip_grad.enabled else None,
    )
    checkpointer = SafeCheckpointer(
        model,
        options.output_dir,
        class_names=class_names(cfg.dataloader.train.dataset),
        trainer=trainer,
    )
    ema = ModelEMA(model, options.model_ema.decay) if options.model_ema.enabled else None
    if ema:
        checkpointer.add_checkpointable("model_ema", ema.averaged)
    evaluated = ema.module if ema else model
    names = class_names(cfg.dataloader.test.dataset)
    if options.wandb.enabled and is_main:
        start_wandb(options)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            ema,
            hooks.PeriodicCheckpointer(checkpointer, **options.checkpointer) if is_main else None,
            hooks.EvalHook(options.eval_period, lambda: evaluate(cfg, evaluated, test_loader)),
        ]
    )
    if is_main:
        writers = default_writers(options.output_dir, options.max_iter)
        best = BestCheckpointer(options.eval_period, checkpointer, **options.best_checkpointer)
        mapper = instantiate(cfg.dataloader.test.mapper)
        trainer.register_hooks(
            [
                best,
                PredictionPictures(options.eval_period, evaluated, test_dataset, mapper, names),
                hooks.PeriodicWriter(writers, period=options.log_period),
                RunSummary(options.output_dir, best),
            ]
        )
    rest = checkpointer.resume_or_load(options.init_checkpoint, resume=resume)
    different = other_classes(rest, names)
    if different:
        logging.getLogger(f"detectron2.{__name__}").warning(f"the checkpoint {different}")
    first = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(first, options.max_iter)


def start_wandb(options: DictConfig):
    """Send everything that goes to TensorBoard to Weights & Biases as well.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise UserError("train.wandb.enabled needs wandb: pip install wandb") from None
    wandb.init(sync_tensorboard=True, **options.wandb.params)


def main(args):
    """One process of a run. A person's mistake ends it with one line."""
    try:
        cfg, remarks = setup(args)
        # Without the config file, whose source it would print: config.yaml records it in full.
        default_setup(cfg, argparse.Namespace(**{**vars(args), "config_file": ""}))
        if remarks:
            logging.getLogger(f"detectron2.{__name__}").warning(f"data set: {remarks}")
        if args.eval_only:
            evaluate_only(cfg)
        else:
            train(cfg, args.resume)
    except (UserError, FloatingPointError) as error:
        message = str(error)
        if isinstance(error, FloatingPointError):
            message = (
                f"{message.splitlines()[0]} Try a lower optimizer.lr, train.clip_grad.enabled=true "
                "or train.amp.enabled=false; start from a checkpoint well before."
            )
        if comm.get_local_rank() == 0:
            print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def main_of_torchrun(args):
    """One process of a run that torchrun started: it says who we are in the environment."""
    has_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if has_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    main(args)
    dist.destroy_process_group()


if __name__ == "__main__":
    arguments = default_argument_parser(epilog=__doc__).parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        main_of_torchrun(arguments)
    else:
        try:
            launch(
                main,
                arguments.num_gpus,
                num_machines=arguments.num_machines,
                machine_rank=arguments.machine_rank,
                dist_url=arguments.dist_url,
                args=(arguments,),
            )
        except ProcessExitedException as error:  # the process has said why
            sys.exit(error.exit_code)
