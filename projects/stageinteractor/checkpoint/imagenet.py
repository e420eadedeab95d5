"""ImageNet weights: bare classifiers, fitted into a backbone.

Known are ResNets of torchvision, timm, open-mmlab and Detectron2's model zoo, Swin of Microsoft and
timm, and whatever else timm has for ``TimmBackbone``.
"""

import re

from torch import Tensor

from .released import project_name


def backbone_names(names: list[str]) -> list[str]:
    """What classifiers of the formats we know call their weights, as in a detector's backbone."""
    if "layer1.0.conv1.weight" in names:  # torchvision's ResNets, and timm's and open-mmlab's
        return [project_name(f"backbone.{name}") or name for name in names]
    if "layers.0.downsample.norm.weight" not in names:
        # timm merges patches before a stage of a Swin, Microsoft and Detectron2 after it.
        names = [
            re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", n)
            for n in names
        ]
    return [f"backbone.{name}" for name in names]


def backbone_weights(
    weights: dict[str, Tensor], model: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]] | None:
    """Weights of a classifier under the names of a model that has it as its backbone.

    Args:
        weights: a bare state dict of a classifier, or anything else.
        model: state dict of the detector.

    Returns:
        the weights, and the names of those without a place, such as the classifier's last layer;
        or None where this is no classifier that could be the backbone.
    """
    if any(name in model for name in weights):
        return None
    best, wrapped = {}, [f"backbone.body.{name}" for name in weights]  # as in TimmBackbone
    for candidates in (backbone_names(list(weights)), wrapped):
        fitted = {new: old for new, old in zip(candidates, weights) if new in model}
        best = max(best, fitted, key=len)
    if not best:
        return None
    placed = set(best.values())
    ignored = ("num_batches_tracked", "attn_mask", "relative_position_index")
    left_out = [name for name in weights if name not in placed and not name.endswith(ignored)]
    return {new: weights[old] for new, old in best.items()}, left_out
