"""Detectron2's simple trainer with mixed precision on any device, accumulation and clipping."""

import contextlib
import time
from typing import Any, Dict, Iterable, Optional

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class DeferredScalars(EventStorage):
    """Stands in for a storage while a model runs, and leaves on the device what is still there.

    Args:
        storage: takes everything but scalars that are tensors.
    """

    def __init__(self, storage: EventStorage):
        vars(self).update(vars(storage))
        self.tensors: Dict[str, torch.Tensor] = {}

    def put_scalar(self, name, value, *args, **kwargs):
        if isinstance(value, torch.Tensor):
            self.tensors[name] = value
        else:
            super().put_scalar(name, value, *args, **kwargs)


class Trainer(SimpleTrainer):
    """One optimizer step on one or several batches.

    Beside the losses it records ``grad_norm``, before clipping, and ``images_per_second`` of all
    processes together. Losses and the tensors that the model recorded, both averaged over the
    batches of a step, are read together with the norm: every reading waits for the device.

    Args:
        model: takes a batch, returns a dictionary of losses.
        data_loader: yields batches.
        optimizer: updates the model.
        amp_dtype: precision of the forward pass, or None for that of the weights. float16 scales
            the loss to keep small gradients.
        accumulation_steps: batches whose gradients are averaged before a step. Each batch has loss
            normalisers of its own.
        clip_grad: arguments of ``torch.nn.utils.clip_grad_norm_``, or None not to clip.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        *,
        amp_dtype: Optional[torch.dtype] = None,
        accumulation_steps: int = 1,
        clip_grad: Optional[Dict[str, Any]] = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.device_type = next(model.parameters()).device.type
        self.amp_dtype = amp_dtype
        self.accumulation_steps = accumulation_steps
        self.clip_grad = clip_grad
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=amp_dtype == torch.float16
        )

    def run_step(self):
        """Forward and backward each batch, clip if that is wanted, and step.

        Raises:
            FloatingPointError: a loss or the norm of the gradient is not finite; the weights are
                as they were.
        """
        start = time.perf_counter()
        self.optimizer.zero_grad()
        figures: Dict[str, torch.Tensor] = {}
        data_time, num_images = 0.0, 0
        for index in range(self.accumulation_steps):
            asked = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - asked
            num_images += len(batch)
            with self._gradients_stay_local(index + 1 < self.accumulation_steps):
                with DeferredScalars(self.storage) as recorded, torch.autocast(
                    self.device_type, self.amp_dtype, enabled=self.amp_dtype is not None
                ):
                    losses = self.model(batch)
                total = sum(losses.values()) / self.accumulation_steps
                self.grad_scaler.scale(total).backward()
            for name, value in {**recorded.tensors, **losses}.items():
                figures[name] = figures.get(name, 0) + value.detach() / self.accumulation_steps

        self.grad_scaler.unscale_(self.optimizer)
        norm = self._clip_gradients()
        norm, *values = torch.stack([norm, *figures.values()]).cpu()
        figures = dict(zip(figures, values))
        self._write_metrics({name: figures.pop(name) for name in losses}, data_time)
        self.storage.put_scalars(**figures)
        self.storage.put_scalar("grad_norm", norm, smoothing_hint=False)
        # float16 may overflow while its scale adapts: then the scaler skips the step.
        if not norm.isfinite() and not self.grad_scaler.is_enabled():
            raise FloatingPointError(f"Gradient is not finite at iteration={self.iter}!")
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        speed = num_images * comm.get_world_size() / (time.perf_counter() - start)
        self.storage.put_scalar("images_per_second", speed)

    def _clip_gradients(self) -> torch.Tensor:
        """Norm of the gradient, which is clipped if that is wanted."""
        if self.clip_grad is not None:
            return nn.utils.clip_grad_norm_(self.model.parameters(), **self.clip_grad)
        return nn.utils.get_total_norm(
            [p.grad for p in self.model.parameters() if p.grad is not None]
        )

    def _gradients_stay_local(self, local: bool):
        """Ranks exchange gradients once a step, with the last batch."""
        if local and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> Dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: Dict[str, Any]):
        super().load_state_dict(state_dict)
        if state_dict["grad_scaler"] and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
