"""One decoder stage: attention among queries, sampling, mixing, feed-forward network, heads."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .filter_reuse import DynamicFilters
from .sampling import Pyramid

PRIOR_PROBABILITY = 0.01  # of every class at first, so that the focal loss starts small


class DecoderState(NamedTuple):
    """What travels from stage to stage."""

    content: Tensor  # (B, N, D)
    xyzr: Tensor  # (B, N, 4) positional vectors, pixels of the network input
    filters: tuple[DynamicFilters, ...]  # those that each stage so far has generated
    pyramid: Pyramid  # the same for all stages


class FeedForward(nn.Module):
    """Two linear layers with a ReLU, residual and LayerNorm."""

    def __init__(self, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, embed_dim)
        )
        self.norm = nn.LayerNorm(embed_dim)
        for name in ("0.weight", "2.weight"):
            nn.init.xavier_uniform_(self.layers.get_parameter(name))

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
    for name in ("0.weight", "3.weight"):
        nn.init.xavier_uniform_(head.get_parameter(name))
    return head


class DecoderStage(nn.Module):
    """Refine the content, the box and the class scores of every query once.

    Args:
        attention: content (B, N, D) and positional vectors (B, N, 4) -> content, such as
            ``IoFSelfAttention``.
        points: content and positional vectors -> sampling points (B, N, G, P, 3), such as
            ``SamplingPoints``.
        mixing: sampled features (B, N, G, P, Dc), content and reused filters -> content and the
            stage's own filters, such as ``CascadeMixing``.
        ffn: content -> content, such as ``FeedForward``.
        reused: indices of the earlier stages whose filters are reused, oldest first.
        refine: positional vectors and regression output (B, N, 4) -> positional vectors.
        embed_dim: size D of the content vectors.
        num_classes: classes C.
    """

    def __init__(
        self,
        *,
        attention: nn.Module,
        points: nn.Module,
        mixing: nn.Module,
        ffn: nn.Module,
        reused: Sequence[int],
        refine: Callable[[Tensor, Tensor], Tensor],
        embed_dim: int,
        num_classes: int,
    ):
        super().__init__()
        self.attention = attention
        self.points = points
        self.mixing = mixing
        self.ffn = ffn
        self.reused = reused
        self.refine = refine
        self.class_head = prediction_head(embed_dim, num_classes)
        self.box_head = prediction_head(embed_dim, 4)
        prior = -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)
        nn.init.constant_(self.class_head.get_parameter("3.bias"), prior)
        for name in ("3.weight", "3.bias"):
            nn.init.zeros_(self.box_head.get_parameter(name))

    def forward(self, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Run the stage.

        Returns:
            sigmoid logits (B, N, C) without a background class, and the state after this stage.
        """
        content = self.attention(state.content, state.xyzr)
        features = state.pyramid.sample(self.points(content, state.xyzr))
        content, own = self.mixing(features, content, [state.filters[k] for k in self.reused])
        content = self.ffn(content)
        xyzr = self.refine(state.xyzr, self.box_head(content).to(state.xyzr.dtype))
        logits = self.class_head(content)
        return logits, DecoderState(content, xyzr, (*state.filters, own), state.pyramid)
