"""One decoder stage: attention among queries, sampling, mixing, feed-forward network, heads."""

import math
from typing import Callable, List, NamedTuple, Union

from torch import Tensor, nn

from .attention import IoFSelfAttention
from .filter_reuse import DynamicFilters
from .mixing import CascadeMixing
from .pyramid import FeatureMaps, FeatureTable
from .sampling import SamplingPoints

PRIOR_PROBABILITY = 0.01  # every class starts this likely, so that the focal loss starts small


class StageOutput(NamedTuple):
    """What a stage hands to the next one and to the criterion."""

    logits: Tensor  # (B, N, C) sigmoid logits, no background class
    xyzr: Tensor  # (B, N, 4) refined positional vectors, pixels
    content: Tensor  # (B, N, D)
    filters: DynamicFilters
    pyramid: Union[FeatureMaps, FeatureTable]


class FeedForward(nn.Module):
    """Two linear layers with a ReLU, residual and LayerNorm."""

    def __init__(self, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, embed_dim)
        )
        self.norm = nn.LayerNorm(embed_dim)
        for layer in (self.layers[0], self.layers[2]):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, content: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.norm(content + self.layers(content))


def prediction_head(embed_dim: int, out_dim: int) -> nn.Sequential:
    """Linear, LayerNorm, ReLU, Linear: (..., embed_dim) -> (..., out_dim)."""
    head = nn.Sequential(
        nn.Linear(embed_dim, embed_dim),
        nn.LayerNorm(embed_dim),
        nn.ReLU(),
        nn.Linear(embed_dim, out_dim),
    )
    nn.init.xavier_uniform_(head[0].weight)
    nn.init.xavier_uniform_(head[3].weight)
    return head


class DecoderStage(nn.Module):
    """Refine the content, the box and the class scores of every query once.

    Args:
        attention, points, mixing: the stage's parts, see their files.
        refine: positional vectors and regression output (B, N, 4) each -> positional vectors.
        embed_dim: size D of the content vectors.
        ffn_dim: hidden size of the feed-forward network.
        num_classes: classes C.
    """

    def __init__(
        self,
        *,
        attention: IoFSelfAttention,
        points: SamplingPoints,
        mixing: CascadeMixing,
        refine: Callable[[Tensor, Tensor], Tensor],
        embed_dim: int,
        ffn_dim: int,
        num_classes: int,
    ):
        super().__init__()
        self.attention = attention
        self.points = points
        self.mixing = mixing
        self.refine = refine
        self.ffn = FeedForward(embed_dim, ffn_dim)
        self.class_head = prediction_head(embed_dim, num_classes)
        self.box_head = prediction_head(embed_dim, 4)
        nn.init.constant_(
            self.class_head[-1].bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)
        )
        nn.init.zeros_(self.box_head[-1].weight)
        nn.init.zeros_(self.box_head[-1].bias)

    def forward(
        self,
        content: Tensor,
        xyzr: Tensor,
        pyramid: Union[FeatureMaps, FeatureTable],
        old: List[DynamicFilters],
    ) -> StageOutput:
        """Run the stage.

        Args:
            content: (B, N, D).
            xyzr: positional vectors (B, N, 4) in pixels, detached.
            pyramid: where features are sampled.
            old: filters of the stages this one reuses, oldest first.
        """
        content = self.attention(content, xyzr)
        features, pyramid = pyramid.sample(self.points(content, xyzr))
        content, filters = self.mixing(features, content, old)
        content = self.ffn(content)
        deltas = self.box_head(content).to(xyzr.dtype)
        xyzr = self.refine(xyzr, deltas)
        return StageOutput(self.class_head(content), xyzr, content, filters, pyramid)
