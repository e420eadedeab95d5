"""Weights and inputs behind the golden figures, rebuilt from names (see golden/README.md).

Each entry of the reference's state dict was drawn from a generator seeded with the CRC-32 of its
name, then shaped by a rule for its kind. Nothing here needs the reference itself.
"""

import math
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.stageinteractor.checkpoint.released import (
    WHOLE_IMAGE,
    project_name,
    swap_merged_patches,
)

SEED = 20
RELEASED = Path(__file__).parent / "golden/released"


def released_shapes(model: str) -> dict[str, tuple]:
    """Name and shape of every entry of a released checkpoint, such as "r50" or "swin_s"."""
    lines = (line.split(" ") for line in (RELEASED / f"{model}.txt").read_text().splitlines())
    return {name: tuple(map(int, filter(None, shape.split(",")))) for name, shape in lines}


def released_entry(name: str, shape: tuple) -> Tensor:
    """The golden value of one entry, by its released name; integers are zero."""
    seed = (zlib.crc32(name.encode()) + 7919 * SEED) % (2**31 - 1)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    leaf = name.rsplit(".", 1)[-1]
    fan_in = math.prod(shape[1:])
    unit = noise / math.sqrt(fan_in)
    dims = len(shape)

    if leaf in ("num_batches_tracked", "relative_position_index"):
        return torch.zeros(shape, dtype=torch.int64)
    if "init_proposal_bboxes" in name:
        return torch.tensor(WHOLE_IMAGE).expand(shape)
    if "iou_snyc_statistics" in name:
        return torch.full(shape, 0.5 if leaf == "running_mean" else 0.0)
    if leaf == "running_mean":
        return 0.1 * noise
    if leaf == "running_var":
        return 1 + 0.25 * noise.abs()
    if leaf == "iof_tau":
        return 2 + noise
    if leaf == "relative_position_bias_table":
        return 0.5 * noise
    if "conv_offset" in name:
        return 0.3 * (unit if dims > 1 else noise)
    if "init_content_features" in name:
        return noise
    if ".fc_cls." in name:
        return 1.2 * noise / fan_in**0.5 if dims == 2 else -2.5 + 0.5 * noise
    if ".fc_reg." in name:
        if dims == 2:
            return 0.15 * noise / fan_in**0.5
        return 0.03 * noise - torch.tensor([0, 0, 0.2, 0])
    if ".feat_extractor." in name:
        if dims == 2:
            return 0.25 * noise / fan_in**0.5
        offsets = 0.3 * noise.view(-1, 3)
        offsets[:, 2] = 2 * offsets[:, 2] - (1.1 if "gen_one_d" in name else 0.7)
        return offsets.flatten()
    if "parameter_generator" in name:
        return 0.125 * noise / fan_in**0.5 if dims == 2 else 0.06 * noise
    if dims == 4:
        return noise * math.sqrt(2 / fan_in)
    if dims == 2:
        return unit
    if leaf == "weight":  # of a norm
        damped = ".bn3." in name or ".downsample.1." in name
        return 0.5 + 0.1 * noise if damped else 1 + 0.2 * noise
    return 0.2 * noise


def load_golden_weights(model: nn.Module, released_names, prefix: str = ""):
    """Fill ``model`` with golden weights, strictly: every entry gets a value.

    Args:
        released_names: names of the reference's entries; shapes are taken from ``model``.
        prefix: which part of this project's names ``model`` holds, such as "decoder.".
    """
    own = model.state_dict()
    state: dict[str, Tensor] = {}
    for released in released_names:
        name = project_name(released)
        if name is not None and name.startswith(prefix):
            name = name[len(prefix):]
            value = released_entry(released, tuple(own[name].shape))
            state[name] = swap_merged_patches(released, value)
    # What is computed or counted, rather than learned, keeps its own values.
    integers = {name: value for name, value in own.items() if not value.is_floating_point()}
    model.load_state_dict({**state, **integers})


def small_pyramid():
    """Feature maps of the small decoder: 2 images of 64 channels, padded to 256x320."""
    generator = torch.Generator().manual_seed(5)
    maps = []
    for stride in (4, 8, 16, 32):
        size = (256 // stride, 320 // stride)
        coarse = torch.randn(2, 64, 5, 6, generator=generator)
        smooth = F.interpolate(coarse, size, mode="bilinear", align_corners=False)
        maps.append(smooth + 0.3 * torch.randn(2, 64, *size, generator=generator))
    return maps


def full_image():
    """The image (1, 3, 256, 320) of the full models, normalised and padded from 250x310."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(1, 3, 9, 11, generator=generator)
    image = F.interpolate(coarse, (256, 320), mode="bicubic", align_corners=False)
    image = image + 0.4 * torch.randn(1, 3, 256, 320, generator=generator)
    image[:, :, 250:] = 0
    image[:, :, :, 310:] = 0
    return image
