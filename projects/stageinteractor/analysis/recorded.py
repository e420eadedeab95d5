"""What the authors' code computes: recorded figures, and the weights and inputs behind them.

Only figures are stored (tests/support/golden). Every weight is drawn from a generator seeded with
the CRC-32 of its released name, then shaped by a rule for its kind; inputs are procedures as well.
"""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..checkpoint.released import WHOLE_IMAGE, convert_released, convert_to_released
from ..errors import UserError

SEED = 20
SMALL_SIZES = [(250, 310), (256, 200)]  # height and width before padding, of the small decoder
FULL_SIZE = 250, 310  # the same, of the image of the complete models


def load_figures(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Read a file of recordings. Raises UserError if it is not there."""
    file = folder / f"{name}.npz"
    if not file.exists():
        raise UserError(f"{file} is missing: run this in a complete checkout of the project")
    with np.load(file, allow_pickle=False) as figures:
        return {key: figures[key] for key in figures.files}


def recorded_objects(
    figures: dict[str, np.ndarray], prefix: str, sizes: Sequence[tuple[int, int]]
) -> list[Instances]:
    """The ground truth of each image of a training step, whose names begin with ``prefix``."""
    return [
        Instances(
            size,
            gt_boxes=Boxes(torch.from_numpy(figures[f"{prefix}gt_boxes_img{i}"]).reshape(-1, 4)),
            gt_classes=torch.from_numpy(figures[f"{prefix}gt_labels_img{i}"]).long(),
        )
        for i, size in enumerate(sizes)
    ]


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


def load_golden_weights(model: nn.Module):
    """Fill a model, or one without backbone and neck, with golden weights: every entry gets one."""
    own = model.state_dict()
    released = convert_to_released(own).weights
    golden = {name: released_entry(name, tuple(value.shape)) for name, value in released.items()}
    # What is computed or counted, rather than learned, keeps its own values.
    integers = {name: value for name, value in own.items() if not value.is_floating_point()}
    model.load_state_dict({**convert_released(golden).weights, **integers})


def small_pyramid() -> list[Tensor]:
    """Feature maps of the small decoder: 2 images of 64 channels, padded to 256x320."""
    generator = torch.Generator().manual_seed(5)
    maps = []
    for stride in (4, 8, 16, 32):
        size = (256 // stride, 320 // stride)
        coarse = torch.randn(2, 64, 5, 6, generator=generator)
        smooth = F.interpolate(coarse, size, mode="bilinear", align_corners=False)
        maps.append(smooth + 0.3 * torch.randn(2, 64, *size, generator=generator))
    return maps


def full_image() -> Tensor:
    """The image (1, 3, 256, 320) of the full models, normalised and padded from 250x310."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(1, 3, 9, 11, generator=generator)
    image = F.interpolate(coarse, (256, 320), mode="bicubic", align_corners=False)
    image = image + 0.4 * torch.randn(1, 3, 256, 320, generator=generator)
    image[:, :, 250:] = 0
    image[:, :, :, 310:] = 0
    return image
