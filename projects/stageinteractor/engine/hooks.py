"""Hooks that Detectron2 lacks, and some of Detectron2's whose state survives a resume here."""

import contextlib
import math
import os
import time
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint import SafeCheckpointer
from ..data.randomness import STEP, seed_random
from .processes import Interrupted
from .progress import WINDOW, ProgressPrinter


class ModelEMA(HookBase):
    """Keeps an exponential moving average of a model's weights, updated after every step.

    Args:
        model: the model being trained.
        decay: weight of the old average in each update.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.source = model.module if isinstance(model, DistributedDataParallel) else model
        self.averaged = AveragedModel(self.source, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def module(self) -> nn.Module:
        """The averaged model."""
        return self.averaged.module

    def before_train(self):
        if not self.averaged.n_averaged:  # weights may have been loaded, but no average
            self.averaged.module.load_state_dict(self.source.state_dict())

    def after_step(self):
        self.averaged.update_parameters(self.source)


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook, whose best figure survives when training resumes."""

    def _best_checking(self):
        # Unlike Detectron2, notes a new best figure before it saves, so that the checkpoint has it.
        latest = self.trainer.storage.latest()
        if self._val_metric not in latest:
            found = ", ".join(sorted(name for name in latest if name.startswith("bbox/")))
            self._logger.warning(
                f"there is no metric {self._val_metric}, so no best checkpoint is kept; there is: "
                f"{found}"
            )
            return
        metric, iteration = latest[self._val_metric]
        if not math.isfinite(metric):
            self._logger.warning(f"{self._val_metric} is {metric}: this checkpoint is not the best")
        elif self.best_metric is None or self._compare(metric, self.best_metric):
            self._update_best(metric, iteration)
            self._checkpointer.save(self._file_prefix, iteration=iteration)

    def state_dict(self) -> dict[str, Any]:
        if self.best_metric is None:
            return {}
        return {"best_metric": float(self.best_metric), "best_iter": int(self.best_iter)}

    def load_state_dict(self, state: dict[str, Any]):
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]


class StepSeeds(HookBase):
    """Seeds all random numbers in every step, so that a resumed run draws the same ones.

    Args:
        seed: of the run. The seed in a checkpoint replaces it.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self):
        seed_random(self.seed, STEP, self.trainer.iter, comm.get_rank())

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, int]):
        self.seed = state["seed"]


class EvalHook(hooks.EvalHook):
    """Detectron2's hook, which also records ``eval_seconds``."""

    def _do_eval(self):
        start = time.perf_counter()
        super()._do_eval()
        seconds = time.perf_counter() - start
        self.trainer.storage.put_scalar("eval_seconds", seconds, smoothing_hint=False)


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's hook. Also saves and stops the run when a stop was requested, on all ranks.

    Hooks registered after it run once more for the step that was saved, when training resumes
    there: see `FinishStep`.

    Args:
        checkpointer: saves in the main process only.
        period: in iterations.
        max_to_keep: number of periodic checkpoints to keep, including those from before a resume;
            None keeps all.
    """

    def __init__(self, checkpointer: SafeCheckpointer, period: int, max_to_keep: int | None):
        super().__init__(checkpointer, period)
        self.max_saved = max_to_keep

    def before_train(self):
        super().before_train()
        if comm.is_main_process():
            self.checkpointer.remove_half_written()

    def after_step(self):
        if comm.is_main_process():
            super().after_step()
            if self.max_saved and (self.trainer.iter + 1) % self.period == 0:
                newest = f"{self.file_prefix}_{self.trainer.iter:07d}.pth"
                saved = self.checkpointer.numbered_checkpoints()
                # Later ones were saved before the user returned to an earlier checkpoint.
                own = [path for path in saved if os.path.basename(path) <= newest]
                for path in own[:-self.max_saved]:
                    os.remove(path)
        if self.trainer.is_stopping:
            self.save()
            comm.synchronize()  # a process that ends takes the others with it
            raise Interrupted

    def stop_if_requested(self):
        """Save and stop during an evaluation, in the main process. Raises Interrupted.

        The other ranks may wait for this one, or it for them. They notice that it is gone only
        after it has saved.
        """
        if comm.is_main_process() and (self.trainer.stop_requested or self.trainer.is_stopping):
            self.save()
            raise Interrupted

    def save(self):
        """Save the last step, unless it has been saved."""
        done = self.trainer.iter + 1
        if done % self.period and done < self.max_iter:
            name = f"{self.file_prefix}_{self.trainer.iter:07d}"
            self.checkpointer.save(name, iteration=self.trainer.iter)


class PeriodicWriter(hooks.PeriodicWriter):
    """Detectron2's hook with our writers, whose medians and files continue when training resumes.

    Register it in the main process, after the hooks that record numbers.

    Args:
        output_dir: folder of the run.
        period: in iterations.
        eval_period: see ``ProgressPrinter``.
    """

    def __init__(self, output_dir: str, period: int, eval_period: int):
        super().__init__([], period)
        self.eval_period = eval_period
        self.folder, self.metrics_file = output_dir, Path(output_dir) / "metrics.json"
        self.json_writer: JSONWriter | None = None
        self.saved: dict[str, Any] = {"scalars": {}, "written": -1}

    def before_train(self):
        trainer, written = self.trainer, self.saved["written"]
        for name, (is_smoothed, samples) in self.saved["scalars"].items():
            for value, iteration in samples:
                trainer.storage.put_scalar(name, value, is_smoothed, iteration)
        # Cut off what will be written again: everything if there was no checkpoint.
        size = self.saved.get("file_size", self._file_size() if trainer.start_iter else 0)
        if self._file_size() > size:
            os.truncate(self.metrics_file, size)
        self.json_writer = JSONWriter(str(self.metrics_file), WINDOW)
        # TensorBoard, too, drops the last step, whose numbers may not have been written.
        dropped = max(trainer.start_iter - 1, 0)
        tensorboard = TensorboardXWriter(self.folder, WINDOW, purge_step=dropped)
        self.json_writer._last_write = tensorboard._last_write = written
        printer = ProgressPrinter(trainer.max_iter, self.eval_period)
        self._writers = [printer, self.json_writer, tensorboard]

    def after_train(self):
        """Write the last numbers, and close the file even if the disk is full.

        An open file would later append what it still holds, in the middle of a resumed run's.
        """
        try:
            super().after_train()
        finally:
            if self.json_writer:
                with contextlib.suppress(OSError):
                    self.json_writer.close()

    def state_dict(self) -> dict[str, Any]:
        storage, scalars = self.trainer.storage, {}
        for name, history in storage.histories().items():
            # One value for each iteration: an evaluation may have been repeated.
            values = {int(i): float(value) for value, i in history.values()[-WINDOW:]}
            samples = [(value, i) for i, value in values.items()]
            scalars[name] = storage.smoothing_hints()[name], samples
        written = self.json_writer._last_write
        return {"scalars": scalars, "file_size": self._file_size(), "written": written}

    def load_state_dict(self, state: dict[str, Any]):
        self.saved = state

    def _file_size(self) -> int:
        return self.metrics_file.stat().st_size if self.metrics_file.exists() else 0


class FinishStep(HookBase):
    """When training resumes, calls the hooks that come after the checkpointer for the saved step.

    This repeats an evaluation that was cut short. Register it last.

    Args:
        checkpointer: the hook that saved the step.
    """

    def __init__(self, checkpointer: PeriodicCheckpointer):
        self.checkpointer = checkpointer

    def before_train(self):
        trainer = self.trainer
        if not trainer.start_iter:
            return
        trainer.iter = trainer.storage.iter = trainer.start_iter - 1
        first = trainer._hooks.index(self.checkpointer) + 1
        for hook in trainer._hooks[first:]:
            hook.after_step()
