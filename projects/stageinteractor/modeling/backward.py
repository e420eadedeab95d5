"""Backward passes that take less time or memory than autograd's own.

Nothing here changes a result: the model can be read without this file.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call ``function(*args)``, keeping only the arguments for the backward pass.

    The backward pass computes everything else again, except for the last operation, whose result it
    does not need. That costs little where cheap operations precede a large matrix product.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def apply(function: type[Function], *args: Any) -> Tensor:
    """Call ``function.apply``, or its plain forward pass if no gradients are computed.

    A trace of the model then shows the operations instead of an opaque function.
    """
    return (function.apply if torch.is_grad_enabled() else function.forward)(*args)


class Blend(Function):
    """own + a b^T (old - own), with gradients that need fewer passes over the filters.

    Filters are (R, rows, columns), the gates a (R, rows) and b (R, columns).
    """

    @staticmethod
    def forward(own: Tensor, old: Tensor, row_gate: Tensor, column_gate: Tensor) -> Tensor:
        return torch.lerp(own, old, row_gate[:, :, None] * column_gate[:, None, :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        own, old, row_gate, column_gate = ctx.saved_tensors
        gate_grad = (old - own).mul_(grad)
        row_grad = (gate_grad @ column_gate[:, :, None])[:, :, 0]
        column_grad = (row_gate[:, None, :] @ gate_grad)[:, 0]
        old_grad = (row_gate[:, :, None] * column_gate[:, None, :]).mul_(grad)
        return grad - old_grad, old_grad, row_grad, column_grad
