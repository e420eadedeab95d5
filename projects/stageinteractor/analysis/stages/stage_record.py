"""Record what every decoder stage does with one picture, while it runs.

The record shows the ideas of the paper: boxes that start as the whole image and close in on an
object, where each query samples the pyramid (section 3.1), how much of the earlier stages' filters
it mixes with (section 3.2), and, if the objects are known, the labels that the assigner takes from
neighbouring stages (section 3.3).
"""

import contextlib
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ...errors import UserError
from ...modeling import StageInteractor
from ...modeling.boxes import xyzr_to_corners
from ...modeling.decoder import DecoderOutput
from ...modeling.filter_reuse import AdaptedFilter
from ...modeling.sampling import level_weights
from ...modeling.targets import gather_targets

CHOSEN = 6  # queries of each kind that are shown unless told otherwise


class Label(NamedTuple):
    """An object that a stage is offered as a label for a query, and the assigner's decision."""

    object: int  # index of the object in the picture
    kind: str  # "kept" or "dropped" if the stage matched it itself, else "borrowed" or "refused"
    iou: float  # of the query's box after the stage and the object, as the assigner computed it
    won_in: list[int]  # stages in scope in which the query won the object

    @property
    def shown_iou(self) -> str:
        """The IoU, rounded down so that it never seems to reach a threshold that it does not."""
        return f"{math.floor(1000 * self.iou) / 1000:.3f}"


class Labels(NamedTuple):
    """The T objects of a picture, and which queries are offered them in each of L stages."""

    boxes: np.ndarray  # (T, 4) corners in pixels of the picture
    classes: np.ndarray  # (T,)
    match: np.ndarray  # (L, N) index of the object that a query won in a stage, or -1
    offers: list[dict[int, list[Label]]]  # per stage, by query; queries without offers are omitted
    iou_threshold: float

    def winners(self) -> np.ndarray:
        """Return the query that won each object in each stage, or -1: (L, T)."""
        won = np.full((len(self.match), len(self.boxes)), -1)
        stage, query = np.nonzero(self.match >= 0)
        won[stage, self.match[stage, query]] = query
        return won


class StageRecord(NamedTuple):
    """What L stages do with N queries: C classes, G groups, P points of a stage, S pyramid levels.

    Boxes and points are in pixels of the picture, not of the resized network input.
    """

    boxes: np.ndarray  # (L + 1, N, 4) corners: before the first stage, then after each
    scores: np.ndarray  # (L, N, C) in 0..1
    points: list[np.ndarray]  # per stage (N, G, P, 2), x and y
    levels: list[np.ndarray]  # per stage (N, G, P, S), the share of each level
    strides: list[int]  # of the S levels, in pixels of the network input
    attention: np.ndarray  # (L, N, N), from the query in the row to that in the column; heads' mean
    # Shares (N,) of old filters in adapted ones, see `old_share`, per stage: of the channel filter
    # of each earlier stage that the stage reuses, and of the preceding stage's spatial filter in
    # the rows adapted from it, or None if the stage generates all rows itself.
    reused: list[dict[int, np.ndarray]]
    reused_rows: list[np.ndarray | None]
    labels: Labels | None  # None without annotations


@contextlib.contextmanager
def recording(model: StageInteractor) -> Iterator[list[dict[str, Any]]]:
    """Keep what the stages compute while the context lasts.

    Yields a dictionary per stage: ``attention`` has the weights (B, H, N, N) and ``points`` the
    sampling points (B, N, G, P, 3). In stages that reuse filters, ``channel_adapter`` and
    ``spatial_adapter`` have what those modules return, see `ChannelFilterAdapter` and
    `SpatialFilterAdapter`.
    """
    seen: list[dict[str, Any]] = [{} for _ in model.decoder.stages]
    with contextlib.ExitStack() as stack:
        for stage, kept in zip(model.decoder.stages, seen):
            stage.attention.attend = functools.partial(attend, kept)
            stack.callback(delattr, stage.attention, "attend")
            parts = {"points": stage.points}
            for name in ("channel_adapter", "spatial_adapter"):
                if part := getattr(stage.mixing, name, None):
                    parts[name] = part
            for name, part in parts.items():
                def keep(module, inputs, output, kept=kept, name=name):
                    kept[name] = output

                stack.callback(part.register_forward_hook(keep).remove)
        yield seen


def attend(kept: dict, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Do what `IoFSelfAttention.attend` does, step by step, and keep the weights."""
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
    kept["attention"] = logits.softmax(-1)
    return kept["attention"] @ value


@torch.no_grad()
def record_stages(
    model: StageInteractor, picture: dict, objects: Instances | None = None
) -> StageRecord:
    """Run a model on one picture and record its stages.

    Args:
        model: in evaluation mode.
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
    points = [stage["points"][0].float().cpu() for stage in seen]
    attention = torch.stack([stage["attention"][0].float().mean(0).cpu() for stage in seen])
    if not all(v.isfinite().all() for v in (outputs.logits, corners, attention, *points)):
        raise UserError("the model computes numbers that are not finite: is it trained?")
    whole = torch.tensor([0, 0, width, height]).expand_as(corners[:1])  # where all queries start
    decoder, groups = model.decoder, model.decoder.num_groups
    return StageRecord(
        boxes=(torch.cat([whole, corners]) * scale.repeat(2)).numpy(),
        scores=outputs.logits[:, 0].float().sigmoid().cpu().numpy(),
        points=[(stage[..., :2] * scale).numpy() for stage in points],
        levels=[level_weights(stage[..., 2], decoder.strides).numpy() for stage in points],
        strides=list(decoder.strides),
        attention=attention.numpy(),
        reused=[
            {earlier: old_share(adapted, groups)
             for earlier, (adapted, _) in zip(stage.reused, kept.get("channel_adapter", []))}
            for stage, kept in zip(decoder.stages, seen)
        ],
        reused_rows=[
            old_share(kept["spatial_adapter"], groups) if "spatial_adapter" in kept else None
            for kept in seen
        ],
        labels=None if objects is None else assign(
            model, outputs, objects, scale, images.image_sizes[0]
        ),
    )


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
    image_size: tuple[int, int],
) -> Labels:
    """Assign the objects as training would, see `CrossStageLabelAssigner`.

    Args:
        scale: x and y factors (2,) from pixels of the network input to those of the picture.
        image_size: height and width of the network input before padding.
    """
    scaled = Instances(
        image_size,
        gt_boxes=Boxes(objects.gt_boxes.tensor / scale.repeat(2)),
        gt_classes=objects.gt_classes,
    )
    targets = gather_targets([scaled], [image_size], model.device)
    logits, boxes = outputs.logits.float(), xyzr_to_corners(outputs.xyzr.float())
    assignment = model.criterion.assign(logits, boxes, targets)
    match = assignment.match[:, 0].cpu()  # (L, N)
    keep, iou = assignment.keep[:, :, 0].tolist(), assignment.iou[:, :, 0].tolist()  # L, L, N
    assigner = model.criterion.label_assigner
    offers: list[dict[int, list[Label]]] = []
    for stage, in_scope in enumerate(assigner.in_scope(len(match), match.device)):
        won = defaultdict(list)  # the stages in which a query won an object
        for other, query in (in_scope[:, None] & (match >= 0)).nonzero().tolist():
            won[query, int(match[other, query])].append(other)
        offers.append(defaultdict(list))
        for (query, number), others in won.items():
            kind = name_kind(stage in others, keep[stage][others[0]][query])
            label = Label(number, kind, iou[stage][others[0]][query], others)
            offers[-1][query].append(label)
    return Labels(
        boxes=objects.gt_boxes.tensor.numpy(),
        classes=objects.gt_classes.numpy(),
        match=match.numpy(),
        offers=[dict(sorted(by_query.items())) for by_query in offers],
        iou_threshold=assigner.iou_threshold,
    )


def name_kind(is_own: bool, is_kept: bool) -> str:
    """Name what happens to a label that the stage's own or another match offers."""
    if is_own:
        return "kept" if is_kept else "dropped"
    return "borrowed" if is_kept else "refused"


def choose_queries(record: StageRecord, count: int = CHOSEN) -> list[int]:
    """Choose queries to show.

    These are the ``count`` with the highest scores in the last stage, best first, followed by at
    most ``count`` that borrow labels, those that borrow most first.
    """
    best = np.argsort(-record.scores[-1].max(-1), kind="stable")[:count].tolist()
    borrowed: Counter[int] = Counter()
    for by_query in record.labels.offers if record.labels else []:
        for query, labels in by_query.items():
            borrowed[query] += sum(label.kind == "borrowed" for label in labels)
    most = [query for query, number in borrowed.most_common(count) if number]
    return list(dict.fromkeys(best + most))


def partners(record: StageRecord, stage: int, query: int, count: int = 5) -> list[int]:
    """Return the other queries that a query attends to most in a stage, in descending order."""
    order = np.argsort(-record.attention[stage, query], kind="stable").tolist()
    return [other for other in order if other != query][:count]


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
