"""The cascade of stages, and everything that differs from stage to stage."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import IoFSelfAttention
from .boxes import refine_boxes
from .fast_sampling import make_pyramid
from .filter_reuse import reused_stages
from .mixing import CascadeMixing
from .sampling import Pyramid, SamplingPoints
from .stage import DecoderStage, DecoderState, FeedForward


class DecoderOutput(NamedTuple):
    """The outputs of all L stages, stacked."""

    logits: Tensor  # (L, B, N, C)
    xyzr: Tensor  # (L, B, N, 4) pixels of the network input
    content: Tensor  # (L, B, N, D)


class StageInteractorDecoder(nn.Module):
    """L decoder stages with their own weights, linked by boxes, content and dynamic filters.

    Args:
        num_classes: classes C.
        embed_dim: size D of the content vectors, a multiple of 8.
        feature_dim: channels G * Dc of the pyramid.
        num_heads: self-attention heads H.
        ffn_dim: hidden size of the feed-forward networks.
        num_groups: channel groups G.
        points_per_stage: sampling points P per group in each stage; its length is the number of
            stages L. The first stage sees the whole image and takes more (supplement, table 4).
        out_points: number of rows after spatial mixing, even.
        first_reuse_stage: first stage, counted from 0, that reuses earlier filters; L or more
            turns reuse off.
        num_stages: how many of the stages there are, from the first one on; None for all.
        strides: pixels of the network input per cell of each pyramid level.
        attention, sampling, mixing, ffn: classes of the parts of each stage.
        refine: function that moves boxes by a stage's regression output.
        make_pyramid: function of maps, strides and ``num_groups`` that brings the maps into the
            form in which the stages sample them.
        checkpoint_stages: compute each stage again in the backward pass instead of keeping its
            intermediate results, which takes more time but less memory.

    Raises:
        ValueError: if sizes do not divide, if there is no stage or one without points, if there are
            fewer stages than ``num_stages``, or if a stage would reuse the spatial filter of a
            stage with another number of points.
    """

    def __init__(
        self,
        *,
        num_classes: int = 80,
        embed_dim: int = 256,
        feature_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        num_groups: int = 4,
        points_per_stage: Sequence[int] = (64, 32, 32, 32, 32, 32),
        out_points: int = 128,
        first_reuse_stage: int = 2,
        num_stages: int | None = None,
        strides: Sequence[int] = (4, 8, 16, 32),
        attention: type[nn.Module] = IoFSelfAttention,
        sampling: type[nn.Module] = SamplingPoints,
        mixing: type[nn.Module] = CascadeMixing,
        ffn: type[nn.Module] = FeedForward,
        refine: Callable[[Tensor, Tensor], Tensor] = refine_boxes,
        make_pyramid: Callable[[list[Tensor], Sequence[int], int], Pyramid] = make_pyramid,
        checkpoint_stages: bool = False,
    ):
        super().__init__()
        if embed_dim % 8 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim={embed_dim} must be a multiple of 8 and of num_heads={num_heads}"
            )
        if not points_per_stage or min(points_per_stage) < 1:
            raise ValueError(f"points_per_stage={list(points_per_stage)}: a number for each stage")
        if num_stages is not None and num_stages not in range(1, len(points_per_stage) + 1):
            raise ValueError(f"{num_stages=}: 1 to {len(points_per_stage)}, as many stages as "
                             "points_per_stage has")
        points_per_stage = points_per_stage[:num_stages]
        if feature_dim % num_groups:
            raise ValueError(f"feature_dim={feature_dim} must be a multiple of {num_groups=}")
        if out_points % 2:
            raise ValueError(f"{out_points=} must be even: reused filters supply half of the rows")
        if first_reuse_stage < 1:
            raise ValueError(f"{first_reuse_stage=}: stage 0 has no stage before it to reuse")
        for stage in range(first_reuse_stage, len(points_per_stage)):
            if points_per_stage[stage] != points_per_stage[stage - 1]:
                raise ValueError(
                    f"stage {stage} reuses the spatial filter of stage {stage - 1}, but they have "
                    f"{points_per_stage[stage]} and {points_per_stage[stage - 1]} points: make "
                    "points_per_stage equal there or raise first_reuse_stage"
                )
        self.make_pyramid = make_pyramid
        self.checkpoint_stages = checkpoint_stages
        self.num_groups, self.strides = num_groups, tuple(strides)
        sizes = {"embed_dim": embed_dim, "num_groups": num_groups}
        self.stages = nn.ModuleList(
            DecoderStage(
                attention=attention(embed_dim, num_heads),
                points=sampling(**sizes, num_points=num_points),
                mixing=mixing(
                    **sizes,
                    feature_dim=feature_dim,
                    num_points=num_points,
                    out_points=out_points,
                    num_reused=len(reused_stages(stage, first_reuse_stage)),
                ),
                ffn=ffn(embed_dim, ffn_dim),
                reused=reused_stages(stage, first_reuse_stage),
                refine=refine,
                embed_dim=embed_dim,
                num_classes=num_classes,
            )
            for stage, num_points in enumerate(points_per_stage)
        )

    def compile_stages(self) -> None:
        """Run every stage through ``torch.compile`` from now on. Names of weights do not change.

        The number of queries must not change. A second batch size or image size compiles the stages
        once more, for all sizes.
        """
        for stage in self.stages:
            stage.compile()

    def forward(self, content: Tensor, xyzr: Tensor, maps: list[Tensor]) -> DecoderOutput:
        """Run all stages.

        Args:
            content: initial content vectors (B, N, D).
            xyzr: initial positional vectors (B, N, 4), pixels of the network input.
            maps: (B, feature_dim, H_l, W_l), finest first.
        """
        pyramid = self.make_pyramid(maps, self.strides, self.num_groups)
        state, outputs = DecoderState(content, xyzr, (), pyramid), []
        for stage in self.stages:
            # A box loss reaches only its own stage's head; content and filters carry gradients on.
            state = state._replace(xyzr=state.xyzr.detach())
            if self.checkpoint_stages and torch.is_grad_enabled():
                logits, state = checkpoint(stage, state, use_reentrant=False)
            else:
                logits, state = stage(state)
            outputs.append((logits, state.xyzr, state.content))
        return DecoderOutput(*map(torch.stack, zip(*outputs)))
