"""Reads of a config what detrex's ``tools/train_net.py`` reads, and calls the same in its order.

But any device will do. detrex asserts that there is CUDA, whose mixed precision it takes. Weights &
Biases is left out.
"""

import os
import sys
import time

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    hooks,
    launch,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from detectron2.utils.file_io import PathManager
from detrex.modeling import ema

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Trainer(SimpleTrainer):
    """One with float16 and clipping."""

    def __init__(self, model, dataloader, optimizer, amp, clip_grad_params):
        super().__init__(model=model, data_loader=dataloader, optimizer=optimizer)
        self.device = next(model.parameters()).device.type
        self.amp, self.clip_grad_params = amp, clip_grad_params
        self.grad_scaler = torch.amp.GradScaler(self.device) if amp else None

    def run_step(self):
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with torch.autocast(self.device, torch.float16, enabled=self.amp):
            losses = self.model(batch)
            total = sum(losses.values())
        self.optimizer.zero_grad()
        if self.amp:
            self.grad_scaler.scale(total).backward()
            if self.clip_grad_params is not None:
                self.grad_scaler.unscale_(self.optimizer)
                self.clip_grads()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            total.backward()
            if self.clip_grad_params is not None:
                self.clip_grads()
            self.optimizer.step()
        self._write_metrics(losses, data_time)

    def clip_grads(self):
        trained = [p for p in self.model.parameters() if p.requires_grad and p.grad is not None]
        torch.nn.utils.clip_grad_norm_(parameters=trained, **self.clip_grad_params)

    def state_dict(self):
        state = super().state_dict()
        return {**state, "grad_scaler": self.grad_scaler.state_dict()} if self.amp else state

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.amp:
            self.grad_scaler.load_state_dict(state["grad_scaler"])


def evaluate(cfg, model):
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    print_csv_format(results)
    return results


def do_test(cfg, model, eval_only=False):
    if "evaluator" not in cfg.dataloader:
        return None
    results = evaluate(cfg, model)
    if cfg.train.model_ema.enabled and not eval_only:
        with ema.apply_model_ema_and_restore(model):
            results.update(evaluate(cfg, model))
    return results


def do_train(args, cfg):
    model = instantiate(cfg.model)
    model.to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = create_ddp_model(model, **cfg.train.ddp)
    ema.may_build_model_ema(cfg, model)
    trainer = Trainer(
        model,
        loader,
        optimizer,
        amp=cfg.train.amp.enabled,
        clip_grad_params=cfg.train.clip_grad.params if cfg.train.clip_grad.enabled else None,
    )
    checkpointer = DetectionCheckpointer(
        model, cfg.train.output_dir, trainer=trainer, **ema.may_get_ema_checkpointer(cfg, model)
    )
    if comm.is_main_process():
        PathManager.mkdirs(cfg.train.output_dir)
        writers = [
            CommonMetricPrinter(cfg.train.max_iter),
            JSONWriter(os.path.join(cfg.train.output_dir, "metrics.json")),
            TensorboardXWriter(cfg.train.output_dir),
        ]
        assert not cfg.train.wandb.enabled
    is_main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            ema.EMAHook(cfg, model) if cfg.train.model_ema.enabled else None,
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if is_main else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: do_test(cfg, model)),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period) if is_main else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    resumes = args.resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if resumes else 0, cfg.train.max_iter)


def main(args):
    cfg = LazyConfig.load(args.config_file)
    cfg = LazyConfig.apply_overrides(cfg, args.opts)
    default_setup(cfg, args)
    if cfg.train.fast_dev_run.enabled:
        cfg.train.max_iter, cfg.train.eval_period, cfg.train.log_period = 20, 10, 1
    if not args.eval_only:
        do_train(args, cfg)
        return
    model = instantiate(cfg.model)
    model.to(cfg.train.device)
    model = create_ddp_model(model)
    ema.may_build_model_ema(cfg, model)
    checkpointer = DetectionCheckpointer(model, **ema.may_get_ema_checkpointer(cfg, model))
    checkpointer.load(cfg.train.init_checkpoint)
    if cfg.train.model_ema.enabled and cfg.train.model_ema.use_ema_weights_for_eval_only:
        ema.apply_model_ema(model)
    print(do_test(cfg, model, eval_only=True))


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
