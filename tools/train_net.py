#!/usr/bin/env python
"""Train and evaluate a model described by a LazyConfig file, on Detectron2's engine.

    python tools/train_net.py --config-file FILE [--num-gpus N] [--resume] [key=value ...]
    python tools/train_net.py --config-file FILE --eval-only train.init_checkpoint=FILE
    torchrun --nproc-per-node N tools/train_net.py --config-file FILE

Without a GPU, --num-gpus N starts N processes on the CPU.
--eval-only takes exported files, too: .onnx, .xml and .pt2 (docs/deploy.md).
A config FILE is code that runs, in Python and in YAML: read a stranger's before you use it.
"""

import argparse
import logging
import os
import signal

if __name__.endswith("_main__") and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the middle of an import

# Idle OpenMP threads spin before they sleep. With a second process on the same cores, spinning for
# the default time makes a step up to ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import _start  # noqa: F401
from detectron2.config import instantiate
from detectron2.engine import hooks
from detectron2.utils import comm
from omegaconf import DictConfig

from projects.stageinteractor.config.building import load_dataset
from projects.stageinteractor.config.main_process import in_main_process
from projects.stageinteractor.config.preflight import class_names
from projects.stageinteractor.config.schedule import fit_schedule
from projects.stageinteractor.engine.evaluation import evaluate, evaluate_only
from projects.stageinteractor.engine.failures import report_failures
from projects.stageinteractor.engine.hooks import (
    BestCheckpointer,
    EvalHook,
    FinishStep,
    ModelEMA,
    PeriodicCheckpointer,
    PeriodicWriter,
    StepSeeds,
)
from projects.stageinteractor.engine.prediction_pictures import PredictionPictures
from projects.stageinteractor.engine.processes import is_restarted, start, stop_on_signals
from projects.stageinteractor.engine.progress import log_next_commands, start_wandb
from projects.stageinteractor.engine.resume import build_checkpointer, load_start
from projects.stageinteractor.engine.setup import claim_folder, load_run_config, start_log
from projects.stageinteractor.engine.training_parts import (
    build_distributed_model,
    build_loader,
    build_lr_multiplier,
    build_trainer,
)

LOGGER = logging.getLogger(f"detectron2.{__name__}")


def do_train(cfg: DictConfig, resume: bool):
    """Train to ``train.max_iter``, from the last checkpoint of the output folder if ``resume``."""
    options = cfg.train
    datasets = {split: load_dataset(cfg, split) for split in ("train", "test")}
    fit_schedule(cfg, len(datasets["train"]))
    test_loader = build_loader(cfg, "test", datasets["test"])
    classes = class_names(cfg.dataloader.test.dataset)

    model = build_distributed_model(cfg)
    trainer = build_trainer(cfg, model, build_loader(cfg, "train", datasets["train"]))
    ema = ModelEMA(model, options.model_ema.decay) if options.model_ema.enabled else None
    evaluated = ema.module if ema else model
    checkpointer = build_checkpointer(cfg, trainer, datasets, ema)
    saving = PeriodicCheckpointer(checkpointer, **options.checkpointer)

    def do_test() -> dict:
        return evaluate(cfg, evaluated, test_loader, before_batch=saving.stop_if_requested)

    trainer.register_hooks([
        StepSeeds(comm.shared_random_seed()),
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=build_lr_multiplier(cfg)),
        ema,
        saving,
        EvalHook(options.eval_period, do_test),
    ])
    in_main_process(lambda: start_wandb(options.wandb))
    if comm.is_main_process():
        mapper = instantiate(cfg.dataloader.test.mapper)
        trainer.register_hooks([
            BestCheckpointer(options.eval_period, checkpointer, **options.best_checkpointer),
            PredictionPictures(options.eval_period, evaluated, datasets["test"], mapper, classes),
            PeriodicWriter(options.output_dir, options.log_period, options.eval_period),
        ])
    trainer.register_hooks([FinishStep(saving)])

    first = load_start(checkpointer, options, classes, resume)
    with stop_on_signals(trainer):
        trainer.train(first, options.max_iter)
    if comm.is_main_process():
        log_next_commands(options.output_dir)


def main(args: argparse.Namespace):
    """One process of a run. A user's mistake ends it with one line."""
    with report_failures():
        cfg, remarks = load_run_config(args)
        with claim_folder(cfg, args):
            start_log(cfg, args)
            LOGGER.info(
                f"{args.config_file} on {cfg.train.device}, processes: {comm.get_world_size()}; "
                f"config.yaml, log.txt and results go to {cfg.train.output_dir}"
            )
            if remarks:
                LOGGER.warning(f"data set: {remarks}")
            if args.eval_only:
                evaluate_only(cfg)
            else:
                do_train(cfg, args.resume)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Detectron2's arguments and ours. A run that torchrun or Slurm restarts resumes by itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE",
                        help="a LazyConfig in Python, or the config.yaml of a run")
    parser.add_argument("--resume", action="store_true",
                        help="continue from the last checkpoint in train.output_dir, if any")
    parser.add_argument("--eval-only", action="store_true",
                        help="evaluate train.init_checkpoint instead of training")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N",
                        help="processes on this machine, each with its GPU where there are GPUs")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="I",
                        help="number of this machine, from 0 (docs/several_machines.md)")
    parser.add_argument("--dist-url", default="auto", metavar="tcp://ADDRESS:PORT",
                        help="of the first machine; a single machine picks a free port itself")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS",
                        help="a process that hears nothing from the others for this long fails")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="key=value",
                        help="values of the config, after all options: optimizer.lr=1e-4")
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        value = unknown[0].lstrip("-")
        parser.error(f"there is no option {unknown[0]}. For a value of the config, write {value}")
    args.resume = args.resume or is_restarted()
    return args


if __name__ == "__main__":
    start(main, parse_arguments())
