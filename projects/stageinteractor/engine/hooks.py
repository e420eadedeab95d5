"""Hooks that Detectron2 lacks: a moving average of the weights, a best checkpoint that resumes."""

from typing import Any, Dict

from detectron2.engine import HookBase, hooks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class ModelEMA(HookBase):
    """Keeps an exponential moving average of a model's weights, updated after every step.

    Args:
        model: the model that is trained.
        decay: weight of the old average.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.source = model.module if isinstance(model, DistributedDataParallel) else model
        self.averaged = AveragedModel(self.source, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def module(self) -> nn.Module:
        """The averaged model."""
        return self.averaged.module

    def after_step(self):
        self.averaged.update_parameters(self.source)


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook, which otherwise forgets the best figure when training resumes."""

    def _best_checking(self):
        # Detectron2 saves before it notes the new best figure, which would miss in the checkpoint.
        latest = self.trainer.storage.latest()
        if self._val_metric not in latest:
            found = ", ".join(sorted(name for name in latest if name.startswith("bbox/")))
            self._logger.warning(
                f"no metric {self._val_metric}, so that no best checkpoint is kept: {found}"
            )
            return
        metric, iteration = latest[self._val_metric]
        is_better = self.best_metric is None or self._compare(metric, self.best_metric)
        if is_better and self._update_best(metric, iteration):
            self._checkpointer.save(self._file_prefix, iteration=iteration)

    def describe(self) -> str:
        """The best and the last figure, for a person; empty if nothing was evaluated."""
        last = self.trainer.storage.latest().get(self._val_metric)
        figures = []
        if self.best_metric is not None:
            # The evaluation after the last iteration has the number of the next one.
            done = min(self.best_iter + 1, self.trainer.max_iter)
            figures.append(f"best {self.best_metric:.2f} after iteration {done}")
        if last is not None:
            figures.append(f"last {last[0]:.2f}")
        return f"{self._val_metric}: {', '.join(figures)}" if figures else ""

    def state_dict(self) -> Dict[str, Any]:
        if self.best_metric is None:
            return {}
        return {"best_metric": float(self.best_metric), "best_iter": int(self.best_iter)}

    def load_state_dict(self, state: Dict[str, Any]):
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]
