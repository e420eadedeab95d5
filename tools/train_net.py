#!/usr/bin/env python
"""Train and evaluate a model described by a LazyConfig file, on Detectron2's engine.

    python tools/train_net.py --config-file FILE [--num-gpus N] [--resume] [key=value ...]
    python tools/train_net.py --config-file FILE --eval-only train.init_checkpoint=FILE
    torchrun --nproc-per-node N tools/train_net.py --config-file FILE

Without a GPU, --num-gpus N starts N processes on the CPU.
A config FILE is code that runs, in Python and in YAML: read one from a stranger before you use it.
"""

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import time
from datetime import timedelta
from collections.abc import Callable, Iterable

if __name__.endswith("_main__") and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the middle of an import

# Idle OpenMP threads spin for a while; with a second process on the same cores, the default while
# makes a step up to ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import _start  # noqa: F401
import torch
import torch.distributed as dist
from detectron2.config import instantiate
from detectron2.engine import default_setup, hooks, launch
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.multiprocessing import ProcessExitedException

from projects.stageinteractor.checkpoint import SafeCheckpointer
from projects.stageinteractor.data import (
    NameUnreadable,
    ReadableBatches,
    begin_loading,
)
from projects.stageinteractor.engine.interruption import (
    EXIT_CODE,
    NOT_SAVED,
    Interrupted,
    forward_to_children,
    is_restarted,
    on_signals,
    raise_on_ctrl_c,
    stop_at_once_next_time,
)
from projects.stageinteractor.engine.hooks import (
    BestCheckpointer,
    FinishStep,
    ModelEMA,
    PeriodicCheckpointer,
    PeriodicWriter,
    StepSeeds,
)
from projects.stageinteractor.engine.prediction_pictures import PredictionPictures
from projects.stageinteractor.engine.resume import (
    RunSettings,
    checkpoint_to_resume,
    fingerprint,
    parameter_names,
)
from projects.stageinteractor.engine.summary import RunSummary, summarize_evaluation
from projects.stageinteractor.engine.trainer import Trainer
from projects.stageinteractor.config.preflight import (
    categories,
    check_dataset,
    check_options,
    class_names,
)
from projects.stageinteractor.config import building
from projects.stageinteractor.inference import open_model
from projects.stageinteractor.engine.processes import exit_at_once, join_torchrun
from projects.stageinteractor.engine.failures import explain, may_be_of_one, takes_traceback
from projects.stageinteractor.engine.out_of_memory import explain_out_of_memory
from projects.stageinteractor.config.schedule import fit_schedule, settle_schedule
from projects.stageinteractor.checkpoint.model_file import other_classes
from projects.stageinteractor.config.overrides import given_keys, load_config
from projects.stageinteractor.config.device import keep_freed_memory, select_device
from projects.stageinteractor.config.own_data import settle_dataset
from projects.stageinteractor.config.portable_config import portable_config
from projects.stageinteractor.engine.progress import set_up_logging
from projects.stageinteractor.engine.run_lock import sole_use
from projects.stageinteractor.errors import TO_RESUME, UserError

LOGGER = logging.getLogger(f"detectron2.{__name__}")


def setup(args) -> tuple[DictConfig, str]:
    """Load and check the config and the data set.

    Returns:
        the config, and remarks on the data set, if there are any.

    Raises:
        UserError: the config or something it names is not usable.
    """
    cfg = load_config(args.config_file, args.opts)
    given = given_keys(args.opts)
    settle_schedule(cfg, given)
    remarks = settle_dataset(cfg, given, training=not args.eval_only)
    building.resolve_detections(cfg, given)
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


def keep_checkpoints(cfg: DictConfig):
    """Raises UserError if the output folder holds a run, which a new one would write over."""
    if comm.all_gather(SafeCheckpointer(nn.Module(), cfg.train.output_dir).has_checkpoint())[0]:
        raise UserError(
            f"{cfg.train.output_dir} holds a run: continue it with --resume, or start another "
            "one with train.output_dir=FOLDER"
        )


def build_loader(cfg: DictConfig, split: str, dataset: list[dict]) -> Iterable:
    """The data loader of ``train`` or ``test`` over its data set."""
    options = {**cfg.dataloader[split], "dataset": dataset}
    if split == "test":
        options["mapper"] = NameUnreadable(instantiate(options["mapper"]))
    elif cfg.train.device.startswith("cuda"):
        options["pin_memory"] = True  # else the copy of an image waits for the step before
    with building.explain_misfits(f"dataloader.{split}"):
        loader = instantiate(options)
    if split == "test":
        loader.worker_init_fn = begin_loading
    return loader


def compile_if_asked(cfg: DictConfig, model: nn.Module):
    """Compile the decoder's stages with ``train.compile``. Raises UserError if there are none."""
    if cfg.train.compile.enabled:
        if not hasattr(getattr(model, "decoder", None), "compile_stages"):
            raise UserError("train.compile.enabled=true: this model has no stages to compile")
        model.decoder.compile_stages()


def build_model(cfg: DictConfig) -> nn.Module:
    """The model on its device, wrapped for several processes if there are any.

    Raises:
        UserError: sizes that do not fit together, or nothing to compile.
    """
    model = building.build_model(cfg)
    compile_if_asked(cfg, model)
    ddp = OmegaConf.to_container(cfg.train.ddp)
    if cfg.train.device != "cuda":
        ddp["device_ids"] = None
    return create_ddp_model(model, **ddp)


def build_optimizer(optimizer: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a model."""
    optimizer.params.model = model
    with building.explain_misfits("optimizer"):
        built = instantiate(optimizer)
    for group in built.param_groups:
        # A list of the config would end up in checkpoints, which hold plain values only.
        group.update({k: tuple(v) for k, v in group.items() if isinstance(v, ListConfig)})
    return built


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
    """Evaluate ``train.init_checkpoint``, its moving average where that is switched on.

    Raises:
        UserError: no checkpoint, one that does not fit, or one without a moving average.
    """
    if not cfg.train.init_checkpoint:
        raise UserError("--eval-only needs a checkpoint: train.init_checkpoint=FILE")
    dataset = building.load_dataset(cfg, "test")
    loader = build_loader(cfg, "test", dataset)
    model, *_ = open_model(cfg.train.init_checkpoint, cfg)
    compile_if_asked(cfg, model)
    with errors_of_each():
        results = evaluate(cfg, model, loader)
    if comm.is_main_process():
        has_truth = any(record.get("annotations") for record in dataset)
        summarize_evaluation(cfg.train.output_dir, cfg.dataloader.test.dataset, has_truth)
    return results


def train(cfg: DictConfig, resume: bool):
    """Train to ``train.max_iter``, from the last checkpoint of the output folder if ``resume``.

    Raises:
        UserError: the output folder holds a run, and this is not to resume it.
        Interrupted: a signal has stopped the run, which is saved.
    """
    options, is_main = cfg.train, comm.is_main_process()
    dataset = building.load_dataset(cfg, "train")
    fit_schedule(cfg, len(dataset))
    train_loader = build_loader(cfg, "train", dataset)
    test_dataset = building.load_dataset(cfg, "test")
    test_loader = build_loader(cfg, "test", test_dataset)
    model = build_model(cfg)
    trainer = Trainer(
        model,
        train_loader,
        build_optimizer(cfg.optimizer, model),
        amp_dtype=getattr(torch, options.amp.dtype) if options.amp.enabled else None,
        accumulation_steps=options.accumulation_steps,
        clip_grad=options.clip_grad.params if options.clip_grad.enabled else None,
        max_skipped_steps=options.max_skipped_steps,
    )
    settings = RunSettings(
        cfg,
        len(dataset),
        images={
            split: fingerprint(records, cfg.dataloader[split].dataset)
            for split, records in (("train", dataset), ("test", test_dataset))
        } if is_main else None,
        parameters=parameter_names(trainer.optimizer, model),
    )
    checkpointer = SafeCheckpointer(
        model,
        options.output_dir,
        class_names=class_names(cfg.dataloader.train.dataset),
        config=portable_config(cfg, categories(cfg.dataloader.train.dataset)),
        trainer=trainer,
        run=settings,
    )
    if hasattr(train_loader, "load_state_dict"):  # Detectron2's starts its order anew
        checkpointer.add_checkpointable("data", train_loader)
    ema = ModelEMA(model, options.model_ema.decay) if options.model_ema.enabled else None
    if ema:
        checkpointer.add_checkpointable("model_ema", ema.averaged)
    evaluated = ema.module if ema else model
    names = class_names(cfg.dataloader.test.dataset)
    if options.wandb.enabled and is_main:
        start_wandb(options)
    saving = PeriodicCheckpointer(checkpointer, **options.checkpointer)

    def stop_if_asked():
        if trainer.stop_requested or trainer.is_stopping:
            saving.save()
            raise Interrupted

    def evaluate_now() -> dict:
        start = time.perf_counter()
        results = evaluate(cfg, evaluated, test_loader, before_batch=stop_if_asked)
        trainer.storage.put_scalar(
            "eval_seconds", time.perf_counter() - start, smoothing_hint=False
        )
        return results

    with building.explain_misfits("lr_multiplier"):
        multiplier = instantiate(cfg.lr_multiplier)
    trainer.register_hooks(
        [
            StepSeeds(comm.shared_random_seed()),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=multiplier),
            ema,
            saving,
            hooks.EvalHook(options.eval_period, evaluate_now),
        ]
    )
    if is_main:
        best = BestCheckpointer(options.eval_period, checkpointer, **options.best_checkpointer)
        mapper = instantiate(cfg.dataloader.test.mapper)
        trainer.register_hooks(
            [
                best,
                PredictionPictures(options.eval_period, evaluated, test_dataset, mapper, names),
                PeriodicWriter(options.output_dir, options.log_period, options.eval_period),
                RunSummary(options.output_dir, best),
            ]
        )
    trainer.register_hooks([FinishStep(saving)])
    last, first = "", 0
    if resume:
        last = checkpoint_to_resume(checkpointer, settings, options.accept_changes)
    if last:
        rest = checkpointer.load(last)
        first = settings.first_iteration(trainer.iter)
        for change in settings.changes(first):
            LOGGER.warning(f"resuming: {change}")
    else:
        rest = checkpointer.load(options.init_checkpoint, checkpointables=[])
    different = other_classes(rest.get("class_names", []), names)
    if different and not last:
        LOGGER.warning(f"the checkpoint {different}")
    logging.getLogger("detectron2.engine.train_loop").addFilter(takes_traceback)

    def stop(number: int):
        trainer.stop_requested = True
        stop_at_once_next_time(number, speaks=is_main)

    with errors_of_each(), on_signals(stop):
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
    raise_on_ctrl_c()
    try:
        cfg, remarks = setup(args)
        with sole_use(cfg.train.output_dir):
            if not (args.eval_only or args.resume or cfg.train.fast_dev_run.enabled):
                keep_checkpoints(cfg)
            set_up_logging(cfg.train.output_dir)
            # Without the config file, whose source it would print: config.yaml records it in full.
            default_setup(cfg, argparse.Namespace(**{**vars(args), "config_file": ""}))
            LOGGER.info(
                f"{args.config_file} on {cfg.train.device}, processes: {comm.get_world_size()}; "
                f"config.yaml, log.txt and results go to {cfg.train.output_dir}"
            )
            if remarks:
                LOGGER.warning(f"data set: {remarks}")
            if args.eval_only:
                evaluate_only(cfg)
            else:
                train(cfg, args.resume)
    except Interrupted:
        if comm.is_main_process():
            how = f"{TO_RESUME} goes on (exit code {EXIT_CODE})"
            print(f"stopped and saved: {how}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        stop_at_once_next_time(signal.SIGINT, speaks=False)
        what = "the evaluation has no result" if args.eval_only else "training had not begun"
        leave(f"interrupted: {what}", code=NOT_SAVED)
    except Exception as error:
        message = explain(error)
        if not message:
            raise
        leave(message, everywhere=may_be_of_one(error))


@contextlib.contextmanager
def errors_of_each():
    """What inside may fail in one process alone, which then says so, whichever it is."""
    try:
        yield
    except UserError as error:
        leave(str(error), everywhere=True)


def leave(message: str, everywhere: bool = False, code: int = 1):
    """End this process with an error that one process of a machine, or each, has to report."""
    if everywhere or comm.get_local_rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)  # a launcher ends all processes with the first: the one that speaks
    sys.exit(code)


def main_of_torchrun(args):
    """One process of a run that torchrun started: it says who we are in the environment."""
    has_gpu = torch.cuda.is_available()
    try:
        join_torchrun("nccl" if has_gpu else "gloo", timedelta(seconds=args.timeout))
    except RuntimeError as error:
        sys.exit(f"error: the processes do not find each other: {str(error).splitlines()[0]}")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    main_of_several(args)


def main_of_several(args):
    """One process of several: they end together, or with the first one that fails."""
    with exit_at_once():
        main(args)
        comm.synchronize()
        dist.destroy_process_group()


def main_of_launched(args):
    """One process of several that this command has started, which passes Ctrl-C on to them."""
    if os.name == "posix":
        os.setpgid(0, 0)  # a terminal would tell them a second time
    main_of_several(args)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments under Detectron2's names, and ours.

    A run that torchrun or Slurm start again resumes by itself.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE",
                        help="a LazyConfig in Python, or a run's config.yaml")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the last checkpoint in train.output_dir, if there is one")
    parser.add_argument("--eval-only", action="store_true",
                        help="evaluate train.init_checkpoint instead of training")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N",
                        help="processes on this machine, a GPU each where there are any")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="I",
                        help="number of this machine, from 0 (docs/several_machines.md)")
    parser.add_argument("--dist-url", default="auto", metavar="tcp://ADDRESS:PORT",
                        help="of the first machine; one machine takes a free port by itself")
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS",
        help="after which a process that hears nothing of the others ends with an error",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="key=value",
                        help="values of the config, after all options: optimizer.lr=1e-4")
    arguments = sys.argv[1:] if arguments is None else arguments
    for text in arguments:
        if re.match(r"--\w+\.[\w.]+=", text):
            parser.error(f"{text}: values of the config have no dashes, write {text[2:]}")
    args = parser.parse_args(arguments)
    args.resume = args.resume or is_restarted()
    return args


def main_of_launch(args):
    """Start the processes of a run, if there are several, and pass signals on to them."""
    several = args.num_gpus * args.num_machines > 1
    if args.num_machines > 1 and args.dist_url == "auto":
        sys.exit("error: several machines need --dist-url tcp://ADDRESS:PORT of the first of them")
    with on_signals(forward_to_children) if several else contextlib.nullcontext():
        try:
            launch(
                main_of_launched if several else main,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
                timeout=timedelta(seconds=args.timeout),
            )
        except ProcessExitedException as error:  # the process has said why, unless it was killed
            if error.signal_name == "SIGINT":  # a second Ctrl-C
                sys.exit(NOT_SAVED)
            if error.signal_name:
                print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code if error.exit_code > 0 else 1)


if __name__ == "__main__":
    arguments = parse_arguments()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        main_of_torchrun(arguments)
    else:
        main_of_launch(arguments)
