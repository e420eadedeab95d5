"""BatchNorm as the released recipe uses it: fixed statistics, trained scale and shift."""

from torch import nn


class EvalModeBatchNorm2d(nn.BatchNorm2d):
    """Always normalise with the stored statistics, also in training, and never update them.

    Unlike those of Detectron2's ``FrozenBatchNorm2d``, the affine parameters are trained.
    """

    def train(self, mode: bool = True) -> "EvalModeBatchNorm2d":
        return super().train(False)
