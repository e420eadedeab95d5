"""What every stage of a decoder does with one picture, recorded while it runs.

The paper's ideas show in it: boxes that start as the whole image and close in on an object, where
each query samples the pyramid (section 3.1), how much of the filters of earlier stages it mixes
with (section 3.2), and, with the objects known, the labels that the assigner takes from
neighbouring stages (section 3.3).
"""

import contextlib
import math
from collections import defaultdict
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from ..errors import UserError
from ..modeling import StageInteractor
from ..modeling.boxes import box_iou, xyzr_to_corners
from ..modeling.decoder import DecoderOutput
from ..modeling.filter_reuse import AdaptedFilter, reused_stages
from ..modeling.sampling import level_weights
from ..modeling.targets import gather_targets

CHOSEN = 6  # queries that are looked at unless others are named


class Label(NamedTuple):
    """An object that a stage is offered for a query, and what the assigner does with it."""

    object: int
    kind: str  # kept or dropped: the stage's own match. borrowed or refused: another stage's
    iou: float  # of the query's box after the stage and the object, which decides
    won_in: List[int]  # the stages in scope in which the query won the object

    @property
    def shown_iou(self) -> str:
        """Cut, not rounded: what is below a threshold must not look as if it reached it."""
        return f"{math.floor(1000 * self.iou) / 1000:.3f}"


class Labels(NamedTuple):
    """The objects of a picture, and whom they are given to; T objects, L stages, N queries."""

    boxes: np.ndarray  # (T, 4) corners in pixels of the picture
    classes: np.ndarray  # (T,)
    match: np.ndarray  # (L, N) the object that a query won in a stage, or -1
    offers: List[Dict[int, List[Label]]]  # of each stage, by query; a query without is left out
    iou_threshold: float

    def winners(self) -> np.ndarray:
        """Of each stage and object the query that won it, or -1: (L, T)."""
        won = np.full((len(self.match), len(self.boxes)), -1)
        stage, query = np.nonzero(self.match >= 0)
        won[stage, self.match[stage, query]] = query
        return won


class StageRecord(NamedTuple):
    """L stages, N queries, C classes, G groups, P points of a stage, S pyramid levels.

    Boxes and points are in pixels of the picture, not of the resized network input.
    """

    boxes: np.ndarray  # (L + 1, N, 4) corners: before the first stage, then after each
    scores: np.ndarray  # (L, N, C) in 0..1
    points: List[np.ndarray]  # of each stage (N, G, P, 2), x and y
    levels: List[np.ndarray]  # of each stage (N, G, P, S), the share of each level
    strides: List[int]  # of the S levels, in pixels of the network input
    attention: np.ndarray  # (L, N, N) from query (row) to query, mean of the heads
    reused: List[Dict[int, np.ndarray]]  # of each stage, by earlier stage: `reused_shares`
    reused_rows: List[Optional[np.ndarray]]  # of each stage: `reused_row_shares`
    labels: Optional[Labels]  # None without annotations


@contextlib.contextmanager
def recording(model: StageInteractor) -> Iterator[Dict[str, list]]:
    """While it lasts, keeps what the stages compute on their way.

    That is ``attention`` (B, H, N, N) and ``points`` (B, N, G, P, 3) of each stage, and of each
    that reuses filters what its adapters give, `ChannelFilterAdapter` the ``channel_adapter``
    and `SpatialFilterAdapter` the ``spatial_adapter``.
    """
    seen: Dict[str, list] = defaultdict(list)
    hooks = []
    for stage in model.decoder.stages:
        hooks.append(stage.attention.register_forward_hook(
            lambda module, inputs, _: seen["attention"].append(module.weights(*inputs))
        ))
        hooks.append(stage.points.register_forward_hook(
            lambda module, inputs, points: seen["points"].append(points)
        ))
        for name in ("channel_adapter", "spatial_adapter"):
            if adapter := getattr(stage.mixing, name, None):
                hooks.append(adapter.register_forward_hook(
                    lambda module, inputs, adapted, name=name: seen[name].append(adapted)
                ))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def record_stages(
    model: StageInteractor, picture: dict, objects: Optional[Instances] = None
) -> StageRecord:
    """Run a model in evaluation mode on one picture.

    Args:
        picture: the model's input: ``image``, and ``height`` and ``width`` of the picture.
        objects: ``gt_boxes`` in pixels of the picture and ``gt_classes``.

    Raises:
        UserError: the model predicts numbers that are not finite.
    """
    with recording(model) as seen:
        images = model.preprocess([picture])
        outputs = model.decode(images)
    height, width = images.image_sizes[0]
    scale = torch.tensor([picture["width"] / width, picture["height"] / height])
    corners = xyzr_to_corners(outputs.xyzr[:, 0].float()).cpu()  # (L, N, 4)
    computed = [outputs.logits, corners, *seen["points"], *seen["attention"]]
    if not all(values.isfinite().all() for values in computed):
        raise UserError("the model computes numbers that are not finite: is it trained?")
    whole = torch.tensor([0, 0, width, height]).expand_as(corners[:1])  # as queries start
    points = [stage[0].float().cpu() for stage in seen["points"]]
    strides = list(model.decoder.strides)
    return StageRecord(
        boxes=(torch.cat([whole, corners]) * scale.repeat(2)).numpy(),
        scores=outputs.logits[:, 0].float().sigmoid().cpu().numpy(),
        points=[(stage[..., :2] * scale).numpy() for stage in points],
        levels=[level_weights(stage[..., 2], strides).numpy() for stage in points],
        strides=strides,
        attention=torch.stack([w[0].float().mean(0) for w in seen["attention"]]).cpu().numpy(),
        reused=reused_shares(model, seen["channel_adapter"]),
        reused_rows=reused_row_shares(model, seen["spatial_adapter"]),
        labels=None if objects is None else assign(model, outputs, objects, scale, images),
    )


def reused_shares(model: StageInteractor, adapted: List[list]) -> List[Dict[int, np.ndarray]]:
    """How much of an old channel filter is in the one a stage mixes with in its place.

    Args:
        adapted: of each stage that reuses filters, what its `ChannelFilterAdapter` has given.

    Returns:
        of each stage, by the earlier stage whose filter it is, the share (N,) in 0..1.
    """
    decoder, given = model.decoder, iter(adapted)
    shares = []
    for index in range(len(decoder.stages)):
        old = reused_stages(index, decoder.first_reuse_stage)
        filters = [filter_ for filter_, _ in next(given)] if old and adapted else []
        shares.append({stage: old_share(filter_, decoder.num_groups)
                       for stage, filter_ in zip(old, filters)})
    return shares


def reused_row_shares(
    model: StageInteractor, adapted: List[AdaptedFilter]
) -> List[Optional[np.ndarray]]:
    """How much of the preceding stage's spatial filter is in the rows that a stage takes from it.

    Args:
        adapted: of each stage that reuses filters, what its `SpatialFilterAdapter` has given.

    Returns:
        of each stage the share (N,) in 0..1, None where it makes all rows itself.
    """
    decoder, shares = model.decoder, [old_share(rows, model.decoder.num_groups) for rows in adapted]
    return [None] * (len(decoder.stages) - len(shares)) + shares


def old_share(adapted: AdaptedFilter, num_groups: int) -> np.ndarray:
    """The mean share (N,) of the old filter in the entries of an adapted one, in 0..1.

    In an entry (a, b) it is gate a times gate b, the rest is the stage's own (`AdaptedFilter`);
    this is the mean over entries and channel groups.
    """
    share = adapted.row_gate.mean(-1) * adapted.column_gate.mean(-1)  # (N * G,)
    return share.float().view(-1, num_groups).mean(-1).cpu().numpy()


def assign(
    model: StageInteractor,
    outputs: DecoderOutput,
    objects: Instances,
    scale: Tensor,
    images: ImageList,
) -> Labels:
    """What training would do with the objects, see `CrossStageLabelAssigner`."""
    criterion, logits = model.criterion, outputs.logits.float()
    scaled = Instances(
        images.image_sizes[0],
        gt_boxes=Boxes(objects.gt_boxes.tensor / scale.repeat(2)),
        gt_classes=objects.gt_classes,
    )
    targets = gather_targets([scaled], images.image_sizes, model.device)
    corners = xyzr_to_corners(outputs.xyzr.float())  # (L, 1, N, 4)
    match = criterion.matcher(logits, corners, targets)  # (L, 1, N)
    assigner = criterion.label_assigner
    assignment = assigner(logits, corners, match, targets.boxes, targets.labels)
    keep = assignment.keep[:, :, 0].cpu()  # (L, L, N)
    in_scope = assigner.in_scope(len(match), keep.device)
    # (L, N, T): the box of a query after a stage, and an object
    iou = box_iou(corners[:, 0, :, None], targets.boxes[0]).cpu()
    match = match[:, 0].cpu()
    offers = []
    for stage, in_reach in enumerate(in_scope.tolist()):
        reached = [other for other, reach in enumerate(in_reach) if reach]
        by_query = {}
        for query in range(match.shape[1]):
            won_in = defaultdict(list)
            for other in reached:
                if match[other, query] >= 0:
                    won_in[int(match[other, query])].append(other)
            if won_in:
                by_query[query] = [
                    Label(
                        number,
                        kind(stage in others, bool(keep[stage, others[0], query])),
                        float(iou[stage, query, number]),
                        others,
                    )
                    for number, others in won_in.items()
                ]
        offers.append(by_query)
    return Labels(
        boxes=objects.gt_boxes.tensor.numpy(),
        classes=objects.gt_classes.numpy(),
        match=match.numpy(),
        offers=offers,
        iou_threshold=assigner.iou_threshold,
    )


def kind(is_own: bool, is_kept: bool) -> str:
    """The name of what happens to a label."""
    if is_own:
        return "kept" if is_kept else "dropped"
    return "borrowed" if is_kept else "refused"


def choose_queries(record: StageRecord, count: int = CHOSEN) -> List[int]:
    """The queries with the highest scores in the last stage, and those that borrow labels.

    At most ``count`` of either, in this order.
    """
    best = np.argsort(-record.scores[-1].max(-1), kind="stable")[:count].tolist()
    borrowed: Dict[int, int] = defaultdict(int)
    for by_query in record.labels.offers if record.labels else []:
        for query, labels in by_query.items():
            borrowed[query] += sum(label.kind == "borrowed" for label in labels)
    most = sorted((q for q, number in borrowed.items() if number), key=lambda q: -borrowed[q])
    return best + [query for query in most[:count] if query not in best]


def partners(record: StageRecord, stage: int, query: int, count: int = 5) -> List[int]:
    """The other queries that a query attends to most in a stage, the most attended first."""
    weights = record.attention[stage, query].copy()
    weights[query] = -1
    return np.argsort(-weights, kind="stable")[: min(count, len(weights) - 1)].tolist()


def check_queries(queries: Sequence[int], record: StageRecord) -> List[int]:
    """The queries that a person has named.

    Raises:
        UserError: one that the model does not have.
    """
    number = record.boxes.shape[1]
    for query in queries:
        if not 0 <= query < number:
            raise UserError(f"there is no query {query}: the model has 0 to {number - 1}")
    return list(dict.fromkeys(queries))
