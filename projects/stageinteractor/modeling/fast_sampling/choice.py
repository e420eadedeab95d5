"""Which form of the pyramid is fastest on a device."""

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..sampling import FeatureMaps, Pyramid
from .table import FeatureTable


@cache
def working_kernel(device: torch.device) -> type[FeatureTable] | None:
    """Return ``KernelTable`` if it works on the device. Otherwise log why not and return None."""
    try:
        from .kernel import KernelTable

        one_cell = KernelTable.from_maps([torch.zeros(1, 1, 1, 1, device=device)], (1,), 1)
        one_cell.sample(torch.zeros(1, 1, 1, 1, 3, device=device))
    # Triton may be missing, may not support the device, or may not find a C compiler.
    except Exception as error:
        logging.getLogger(__name__).warning(
            "Triton does not work on %s, so features are sampled by grid_sample, which is slower: "
            "%s: %s", device, type(error).__name__, str(error).strip().partition("\n")[0],
        )
        return None
    return KernelTable


def make_pyramid(maps: list[Tensor], strides: Sequence[int], num_groups: int) -> Pyramid:
    """Return the form that is fastest on the device of the maps.

    Args:
        maps: (B, G * Dc, H_l, W_l), finest first.
        strides: pixels of the network input per cell of each map.
        num_groups: channel groups G.
    """
    device = maps[0].device
    kind = FeatureTable if device.type == "cpu" else None
    if device.type == "cuda":
        kind = working_kernel(device)
    if kind is None:
        return FeatureMaps(maps, strides, num_groups)
    return kind.from_maps(maps, strides, num_groups)
