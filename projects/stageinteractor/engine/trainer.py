"""Detectron2's simple trainer with mixed precision on any device, accumulation and clipping.

A step whose loss or gradient is not finite leaves the weights unchanged, on all ranks.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.common.history_buffer import HistoryBuffer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..modeling.transfer import send
from .failures import explain_out_of_memory

HISTORY = 1000  # steps whose numbers are kept, for medians
LOGGER = logging.getLogger(f"detectron2.{__name__}")
NAMED = 8  # images of a skipped step that the log names


class DeferredScalars(EventStorage):
    """Stands in for a storage while a model runs, and keeps scalars that are tensors unread.

    Args:
        storage: receives everything else.
    """

    def __init__(self, storage: EventStorage):
        vars(self).update(vars(storage))
        self.tensors: dict[str, torch.Tensor] = {}

    def put_scalar(self, name, value, *args, **kwargs):
        if isinstance(value, torch.Tensor):
            self.tensors[name] = value
        else:
            super().put_scalar(name, value, *args, **kwargs)


class Trainer(SimpleTrainer):
    """One optimizer step on one or several batches.

    Besides the losses it records ``grad_norm``, before clipping, and ``images_per_second`` of all
    processes together. Losses and the tensors that the model recorded are averaged over the batches
    of a step and read together with the norm, because each read waits for the device.

    ``stop_requested`` may be set at any time, in any process. At the end of the current step,
    ``is_stopping`` is then set in all processes.

    Args:
        model: maps a batch to a dictionary of losses.
        data_loader: yields batches.
        optimizer: updates the model.
        amp_dtype: precision of the forward pass, or None for that of the weights. With float16 the
            loss is scaled to keep small gradients.
        accumulation_steps: batches whose gradients are averaged in a step. Each batch normalises
            its losses on its own.
        clip_grad: arguments of ``torch.nn.utils.clip_grad_norm_``, or None not to clip.
        max_skipped_steps: training fails after this many consecutive non-finite steps.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        *,
        amp_dtype: torch.dtype | None = None,
        accumulation_steps: int = 1,
        clip_grad: dict[str, Any] | None = None,
        max_skipped_steps: int = 10,
    ):
        super().__init__(model, data_loader, optimizer)
        self.device = next(model.parameters()).device
        self.amp_dtype = amp_dtype
        self.accumulation_steps = accumulation_steps
        self.clip_grad = clip_grad
        self.grad_scaler = torch.amp.GradScaler(
            self.device.type, enabled=amp_dtype == torch.float16
        )
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = self.skipped_in_a_row = 0
        self.stop_requested = self.is_stopping = False

    def before_train(self):
        # Detectron2 would keep every number of a run: a gigabyte for 36 epochs of COCO.
        self.storage.histories().default_factory = functools.partial(HistoryBuffer, HISTORY)
        super().before_train()

    def after_train(self):
        if self.iter < self.max_iter:
            self.max_iter += 1  # otherwise Detectron2 evaluates after a last step that failed
        super().after_train()

    def run_step(self):
        """Run forward and backward on each batch, clip the gradient if configured, and step.

        Hooks see the gradient in ``after_backward``, once a step, before it is clipped.

        If a loss or the norm of the gradient is not finite in one process, all processes skip the
        step and count it in ``skipped_steps``.

        Raises:
            FloatingPointError: too many consecutive steps were skipped.
            UserError: memory ran out.
        """
        start = time.perf_counter()
        self.optimizer.zero_grad()
        figures: dict[str, torch.Tensor] = {}
        batches, totals = [], []
        data_time = 0.0
        for index in range(self.accumulation_steps):
            asked = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - asked
            # Processes exchange gradients once a step, with the last batch.
            is_last = index + 1 == self.accumulation_steps
            is_local = isinstance(self.model, DistributedDataParallel) and not is_last
            with self.model.no_sync() if is_local else contextlib.nullcontext():
                with explain_out_of_memory(batch, is_training=True):
                    with DeferredScalars(self.storage) as recorded, torch.autocast(
                        self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None
                    ):
                        losses = self.model(batch)
                    total = sum(losses.values()) / self.accumulation_steps
                    self.grad_scaler.scale(total).backward()
            for name, value in {**recorded.tensors, **losses}.items():
                figures[name] = figures.get(name, 0) + value.detach() / self.accumulation_steps
            batches.append(batch)
            totals.append(total.detach())

        self.grad_scaler.unscale_(self.optimizer)
        self.after_backward()
        norm = self._clip_gradients()
        # Sums over all processes, which the host does not wait for here.
        bad_losses = torch.stack(totals).isfinite().logical_not().sum()
        stops = send(torch.tensor(self.stop_requested), self.device)
        events = torch.stack([bad_losses.float(), stops.float()])
        if comm.get_world_size() > 1:
            dist.all_reduce(events)
        read = torch.stack([*events, norm, *totals, *figures.values()]).cpu()
        bad_losses, stops, norm, *values = read
        totals, values = values[:len(batches)], values[len(batches):]
        self.is_stopping = bool(stops)
        # An overflow of float16 may be due to the scale; the scaler then skips the step.
        is_adapting = self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() > 1
        if bad_losses:
            bad = [batch for batch, total in zip(batches, totals) if not total.isfinite()]
            self._skip_step("loss", bad)
        elif not norm.isfinite() and not is_adapting:
            self._skip_step("gradient", batches)
        else:
            self.skipped_in_a_row = 0
            figures = dict(zip(figures, values))
            self._write_metrics({name: figures.pop(name) for name in losses}, data_time)
            self.storage.put_scalars(**figures)
            self.storage.put_scalar("grad_norm", norm, smoothing_hint=False)
            self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        num_images = sum(map(len, batches)) * comm.get_world_size()
        self.storage.put_scalar("images_per_second", num_images / (time.perf_counter() - start))

    def _skip_step(self, what: str, batches: list[list[dict]]):
        """Count a skipped step, and name the images of the batches that may be the reason."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        self.storage.put_scalar("skipped_steps", self.skipped_steps, smoothing_hint=False)
        images = [image for batch in batches for image in batch if isinstance(image, dict)]
        files = [image.get("file_name") for image in images]
        files = [str(name) for names in comm.all_gather(files) for name in names]
        named = ", ".join(files[:NAMED]) + (", ..." if files[NAMED:] else "")
        LOGGER.warning(
            f"iteration {self.iter + 1}: the {what} is not finite: step skipped, "
            f"{self.skipped_in_a_row} in a row, {self.skipped_steps} so far; images: {named}"
        )
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise FloatingPointError(
                f"the {what} was not finite in {self.skipped_in_a_row} steps in a row, up to "
                f"iteration {self.iter + 1} (train.max_skipped_steps), images of the last one: "
                f"{named}"
            )

    def _clip_gradients(self) -> torch.Tensor:
        """Norm of the gradient before clipping. Clips it if configured."""
        if self.clip_grad is not None:
            return nn.utils.clip_grad_norm_(self.model.parameters(), **self.clip_grad)
        return nn.utils.get_total_norm(
            [p.grad for p in self.model.parameters() if p.grad is not None]
        )

    def state_dict(self) -> dict[str, Any]:
        skipped = [self.skipped_steps, self.skipped_in_a_row]
        scaler = self.grad_scaler.state_dict()
        return {**super().state_dict(), "grad_scaler": scaler, "skipped_steps": skipped}

    def load_state_dict(self, state_dict: dict[str, Any]):
        super().load_state_dict(state_dict)
        if state_dict["grad_scaler"] and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.skipped_steps, self.skipped_in_a_row = state_dict.get("skipped_steps", (0, 0))
