"""Record what every stage of a decoder does with one picture, while it runs.

The record shows the ideas of the paper: boxes that start as the whole image and close in on an
object, where each query samples the pyramid (section 3.1), how much of the filters of earlier
stages it mixes with (section 3.2) and, if the objects are known, the labels that the assigner takes
from neighbouring stages (section 3.3).
"""

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from ..errors import UserError
from ..modeling import StageInteractor
from ..modeling.boxes import xyzr_to_corners
from ..modeling.decoder import DecoderOutput
from ..modeling.filter_reuse import AdaptedFilter
from ..modeling.sampling import level_weights
from ..modeling.targets import gather_targets

CHOSEN = 6  # number of queries that are shown if none are named


class Label(NamedTuple):
    """An object that a stage is offered for a query, and what the assigner does with it."""

    object: int
    kind: str  # "kept" or "dropped" if the stage matched it itself, else "borrowed" or "refused"
    iou: float  # of the query's box after the stage and the object, as the assigner computed it
    won_in: list[int]  # the stages in scope in which the query won the object

    @property
    def shown_iou(self) -> str:
        """The IoU, rounded down so that it never seems to reach a threshold that it does not."""
        return f"{math.floor(1000 * self.iou) / 1000:.3f}"


class Labels(NamedTuple):
    """The T objects of a picture, and the queries that get them in each of L stages."""

    boxes: np.ndarray  # (T, 4) corners in pixels of the picture
    classes: np.ndarray  # (T,)
    match: np.ndarray  # (L, N) the object that a query won in a stage, or -1
    offers: list[dict[int, list[Label]]]  # of each stage, by query; queries without are omitted
    iou_threshold: float

    def winners(self) -> np.ndarray:
        """Return the query that won each object in each stage, or -1: (L, T)."""
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
    points: list[np.ndarray]  # of each stage (N, G, P, 2), x and y
    levels: list[np.ndarray]  # of each stage (N, G, P, S), the share of each level
    strides: list[int]  # of the S levels, in pixels of the network input
    attention: np.ndarray  # (L, N, N) from query (row) to query (column), mean of the heads
    reused: list[dict[int, np.ndarray]]  # of each stage, by earlier stage: `reused_shares`
    reused_rows: list[np.ndarray | None]  # of each stage: `reused_row_shares`
    labels: Labels | None  # None without annotations


@contextlib.contextmanager
def recording(model: StageInteractor) -> Iterator[dict[str, list]]:
    """Keep what the stages compute while the context lasts.

    The dictionary has a list for each name, with one entry per stage: ``attention``, the weights
    (B, H, N, N); ``points`` (B, N, G, P, 3); and, of stages that reuse filters, what is returned by
    their ``channel_adapter`` and ``spatial_adapter``, see `ChannelFilterAdapter` and
    `SpatialFilterAdapter`.
    """
    seen: dict[str, list] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        for stage in model.decoder.stages:
            stage.attention.attend = functools.partial(attend, seen["attention"])
            stack.callback(delattr, stage.attention, "attend")
            parts = {"points": stage.points}
            for name in ("channel_adapter", "spatial_adapter"):
                parts[name] = getattr(stage.mixing, name, None)
            for name, part in parts.items():
                if part is not None:
                    hook = part.register_forward_hook(
                        lambda module, inputs, output, name=name: seen[name].append(output)
                    )
                    stack.callback(hook.remove)
        yield seen


def attend(kept: list[Tensor], query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Do as `IoFSelfAttention.attend`, step by step, and append the weights to ``kept``."""
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
    kept.append(logits.softmax(-1))
    return kept[-1] @ value


@torch.no_grad()
def record_stages(
    model: StageInteractor, picture: dict, objects: Instances | None = None
) -> StageRecord:
    """Run a model in evaluation mode on one picture.

    Args:
        picture: the model's input: ``image``, and ``height`` and ``width`` of the picture.
        objects: ``gt_boxes`` in pixels of the picture, and ``gt_classes``.

    Raises:
        UserError: if the model computes numbers that are not finite.
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


def reused_shares(model: StageInteractor, adapted: list[list]) -> list[dict[int, np.ndarray]]:
    """Compute the share of the old channel filter in each adapted one.

    Args:
        adapted: what the `ChannelFilterAdapter` of each stage that reuses filters has returned.

    Returns:
        for each stage, by the earlier stage whose filter it is, the share (N,) in 0..1.
    """
    decoder, returned = model.decoder, iter(adapted)
    shares = []
    for stage in decoder.stages:
        filters = [filter_ for filter_, _ in next(returned)] if stage.reused and adapted else []
        shares.append({earlier: old_share(filter_, decoder.num_groups)
                       for earlier, filter_ in zip(stage.reused, filters)})
    return shares


def reused_row_shares(
    model: StageInteractor, adapted: list[AdaptedFilter]
) -> list[np.ndarray | None]:
    """Compute the share of the preceding stage's spatial filter in the rows adapted from it.

    Args:
        adapted: what the `SpatialFilterAdapter` of each stage that reuses filters has returned.

    Returns:
        for each stage the share (N,) in 0..1, or None if the stage generates all rows itself.
    """
    decoder, shares = model.decoder, [old_share(rows, model.decoder.num_groups) for rows in adapted]
    return [None] * (len(decoder.stages) - len(shares)) + shares


def old_share(adapted: AdaptedFilter, num_groups: int) -> np.ndarray:
    """Compute the mean share (N,) of the old filter in the entries of an adapted one, in 0..1.

    The share in an entry is its row's gate times its column's gate, see `AdaptedFilter`. The mean
    is over entries and channel groups.
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
    """Assign the objects as training would, see `CrossStageLabelAssigner`."""
    scaled = Instances(
        images.image_sizes[0],
        gt_boxes=Boxes(objects.gt_boxes.tensor / scale.repeat(2)),
        gt_classes=objects.gt_classes,
    )
    targets = gather_targets([scaled], images.image_sizes, model.device)
    logits, boxes = outputs.logits.float(), xyzr_to_corners(outputs.xyzr.float())
    assignment = model.criterion.assign(logits, boxes, targets)
    match = assignment.match[:, 0].cpu()  # (L, N)
    keep, iou = assignment.keep[:, :, 0].cpu(), assignment.iou[:, :, 0].cpu()  # (L, L, N)
    assigner = model.criterion.label_assigner
    in_scope = assigner.in_scope(len(match), keep.device)
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
                        float(iou[stage, others[0], query]),
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
    """Name what happens to a label."""
    if is_own:
        return "kept" if is_kept else "dropped"
    return "borrowed" if is_kept else "refused"


def choose_queries(record: StageRecord, count: int = CHOSEN) -> list[int]:
    """Choose queries to show.

    These are the ``count`` with the highest scores in the last stage, best first, followed by at
    most ``count`` that borrow labels, those that borrow most first.
    """
    best = np.argsort(-record.scores[-1].max(-1), kind="stable")[:count].tolist()
    borrowed: dict[int, int] = defaultdict(int)
    for by_query in record.labels.offers if record.labels else []:
        for query, labels in by_query.items():
            borrowed[query] += sum(label.kind == "borrowed" for label in labels)
    most = sorted((q for q, number in borrowed.items() if number), key=lambda q: -borrowed[q])
    return best + [query for query in most[:count] if query not in best]


def partners(record: StageRecord, stage: int, query: int, count: int = 5) -> list[int]:
    """Return the other queries that a query attends to most in a stage, in descending order."""
    weights = record.attention[stage, query].copy()
    weights[query] = -1
    return np.argsort(-weights, kind="stable")[: min(count, len(weights) - 1)].tolist()


def check_queries(queries: Sequence[int], record: StageRecord) -> list[int]:
    """Return the queries that the user named, each once.

    Raises:
        UserError: if the model does not have one of them.
    """
    number = record.boxes.shape[1]
    for query in queries:
        if not 0 <= query < number:
            raise UserError(f"there is no query {query}: the model has 0 to {number - 1}")
    return list(dict.fromkeys(queries))
