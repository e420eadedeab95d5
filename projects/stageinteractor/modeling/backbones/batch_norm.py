"""BatchNorm as the released recipe uses it: fixed statistics, trained scale and shift."""

from torch import nn


class EvalModeBatchNorm2d(nn.BatchNorm2d):
    """Normalises with the stored statistics in training as well, and never updates them.

    Unlike Detectron2's ``FrozenBatchNorm2d``, its affine parameters are trained.
    """

    def train(self, mode: bool = True):
        return super().train(False)
