"""Groups of parameters with their own learning rate and weight decay."""

import re
from collections.abc import Sequence
from typing import Any

from detectron2.solver.build import get_default_optimizer_params
from torch import nn


class BackboneLRFactor:
    """Multiplies the backbone's learning rate, as ``lr_factor_func`` of Detectron2's groups.

    Args:
        factor: the multiplier; 1.0 in the released code.
    """

    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def __call__(self, parameter_name: str) -> float:
        return self.factor if "backbone" in parameter_name.split(".") else 1.0


def groups_exempt_from_decay(
    model: nn.Module, *, exempt: Sequence[str], **options: Any
) -> list[dict[str, Any]]:
    """``get_default_optimizer_params`` with parameters exempt from weight decay by their names.

    Args:
        model: its parameters are grouped.
        exempt: regular expressions; a parameter whose name contains a match does not decay.
        options: other arguments of ``get_default_optimizer_params``.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}

    def is_exempt(parameter: nn.Parameter) -> bool:
        return any(re.search(pattern, names[parameter]) for pattern in exempt)

    groups = []
    for group in get_default_optimizer_params(model, **options):
        exempted = [p for p in group["params"] if is_exempt(p)]
        decaying = [p for p in group["params"] if not is_exempt(p)]
        groups += [{**group, "params": decaying}] if decaying else []
        groups += [{**group, "params": exempted, "weight_decay": 0.0}] if exempted else []
    return groups
