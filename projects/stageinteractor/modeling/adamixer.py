"""The parts in which AdaMixer (Gao et al., CVPR 2022) differs from StageInteractor, built on it.

The rest of this baseline consists of the same parts: neck, queries, decoder stages, matcher, and
the label assigner, set to one-to-one labels. See ``configs/models/adamixer_r50.py``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .attention import IoFSelfAttention
from .boxes import box_sizes
from .filter_reuse import DynamicFilters
from .mixing import CascadeMixing, normalize_and_activate


class AdaMixerAttention(IoFSelfAttention):
    """Attention whose output projection starts with a random bias instead of zero."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        bound = self.out_proj.in_features**-0.5
        nn.init.uniform_(self.out_proj.bias, -bound, bound)


class VanillaSamplingPoints(nn.Module):
    """Place all sampling points directly, without sub-points.

    Scales have the same meaning as in ``sampling.py``. Arguments are those of ``SamplingPoints``.
    """

    def __init__(self, *, embed_dim: int = 256, num_groups: int = 4, num_points: int = 32):
        super().__init__()
        self.num_groups, self.num_points = num_groups, num_points
        self.offsets = nn.Linear(embed_dim, num_groups * num_points * 3)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.offsets.weight)
        offsets = nn.init.zeros_(self.offsets.bias).view(-1, 3)
        nn.init.uniform_(offsets[:, :2], -0.5, 0.5)

    def forward(self, content: Tensor, xyzr: Tensor) -> Tensor:
        """Content (B, N, D) and positional vectors (B, N, 4) -> points (B, N, G, P, 3)."""
        offsets = self.offsets(content).to(xyzr.dtype)
        offsets = offsets.view(*content.shape[:2], self.num_groups, self.num_points, 3)
        box = xyzr[:, :, None, None]
        xy = box[..., :2] + box_sizes(box) * offsets[..., :2]
        return torch.cat([xy, box[..., 2:3] + offsets[..., 2:]], dim=-1)


class AdaMixerSamplingPoints(VanillaSamplingPoints):
    """The same with scales that are smaller by one: a level of stride s suits scale s best."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.offsets.bias[2::3] = -1

    def forward(self, content: Tensor, xyzr: Tensor) -> Tensor:
        xy, z = super().forward(content, xyzr).split([2, 1], dim=-1)
        return torch.cat([xy, z + 1], dim=-1)


class AdaptiveMixing(CascadeMixing):
    """Mix channels, then points, with filters generated from the content, without reuse or biases.

    Arguments are those of ``CascadeMixing``.

    Raises:
        ValueError: if ``num_reused`` is not 0.
    """

    def __init__(self, *, num_reused: int = 0, **sizes: int):
        if num_reused:
            raise ValueError("AdaptiveMixing reuses nothing: first_reuse_stage must be L or more")
        super().__init__(**sizes)
        del self.bias_generator
        nn.init.xavier_uniform_(self.out_proj.weight)

    def forward(
        self, features: Tensor, content: Tensor, old: Sequence[DynamicFilters]
    ) -> tuple[Tensor, DynamicFilters]:
        """Sampled features (B, N, G, P, Dc) and content (B, N, D) -> content, own filters."""
        own = self.generate_filters(content)
        mixed = normalize_and_activate(features.flatten(0, 2) @ own.channel)  # (R, P, Dc)
        mixed = normalize_and_activate(own.spatial @ mixed)  # (R, rows, Dc)
        update = self.out_proj(mixed.view(*content.shape[:2], -1))
        return self.norm(content + update), own


def refine_boxes_by_scale(xyzr: Tensor, deltas: Tensor) -> Tensor:
    """Like ``refine_boxes``, but the centre moves in units of 2^z, whatever the aspect ratio."""
    centre = xyzr[..., :2] + deltas[..., :2] * 2.0 ** xyzr[..., 2:3]
    return torch.cat([centre, xyzr[..., 2:] + deltas[..., 2:]], dim=-1)
