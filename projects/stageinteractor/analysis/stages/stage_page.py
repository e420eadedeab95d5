"""A `StageRecord` as one HTML page that needs no network, no server and no other file."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...drawing.style import KINDS, LEVELS, query_colors
from .stage_record import StageRecord, partners

TEMPLATE = Path(__file__).with_suffix(".html")
LONGEST_SIDE = 1600  # pixels of the picture in the page
TOP_CLASSES = 3  # per query and stage whose scores are shown


def render_page(
    record: StageRecord,
    image: np.ndarray,
    queries: Sequence[int],
    class_names: Sequence[str],
    title: str,
) -> str:
    """Render the page as HTML. Names from files are data in it, never markup or code.

    Args:
        image: the picture (H, W, 3), RGB, uint8.
        queries: those to show, in this order.
        title: which picture and model these are.
    """
    data = {
        "title": title,
        "width": image.shape[1],
        "height": image.shape[0],
        "image": embed(image),
        "classes": list(class_names),
        "strides": record.strides,
        "colors": {"queries": query_colors(len(queries)), "levels": LEVELS, "kinds": KINDS},
        "boxes": rounded(record.boxes),
        "best": [best_classes(scores, 1) for scores in record.scores],
        "queries": [describe_query(record, query) for query in queries],
        "labels": describe_labels(record, queries),
    }
    # Only "<" could end the <script> that holds the data, in a class name for example.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("__RECORD__", text)


def embed(image: np.ndarray) -> str:
    """Encode an image (H, W, 3), RGB, uint8, as a ``data:`` address for an HTML image."""
    picture = Image.fromarray(image)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def rounded(values: np.ndarray, digits: int = 1) -> list:
    """Round an array, and return it as nested lists."""
    return np.round(values.astype(float), digits).tolist()


def best_classes(scores: np.ndarray, count: int) -> list[list]:
    """Find the most likely classes of each query: scores (N, C) -> N lists [class, score, ...]."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return [
        [part for index in row for part in (int(index), round(float(of_query[index]), 2))]
        for of_query, row in zip(scores, order)
    ]


def describe_query(record: StageRecord, query: int) -> dict[str, object]:
    """Collect what the page shows of one query; lists have an entry per stage."""
    stages = range(len(record.scores))
    groups, points = zip(*(stage[query].shape[:2] for stage in record.points))
    return {
        "id": query,
        "scores": [best_classes(record.scores[i][[query]], TOP_CLASSES)[0] for i in stages],
        # (G * P, 2) and (G * P, S), group by group
        "points": [rounded(stage[query].reshape(-1, 2)) for stage in record.points],
        "levels": [
            rounded(stage[query].reshape(-1, len(record.strides)), 2) for stage in record.levels
        ],
        "groups": groups,
        "per_group": points,
        "partners": [
            [[other, round(float(record.attention[i, query, other]), 3)]
             for other in partners(record, i, query)]
            for i in stages
        ],
        "to_itself": [round(float(record.attention[i, query, query]), 3) for i in stages],
        "reused": [
            [[stage, round(float(share[query]), 3)] for stage, share in reused.items()]
            for reused in record.reused
        ],
        "reused_rows": [
            None if share is None else round(float(share[query]), 3) for share in record.reused_rows
        ],
    }


def describe_labels(record: StageRecord, queries: Sequence[int]) -> dict[str, object] | None:
    """Collect the objects and the labels that stages are offered; None without annotations."""
    labels = record.labels
    if labels is None:
        return None
    return {
        "boxes": rounded(labels.boxes),
        "classes": labels.classes.tolist(),
        "threshold": labels.iou_threshold,
        "winners": labels.winners().tolist(),
        "offers": [
            {query: [[o.object, o.kind, o.shown_iou, o.won_in] for o in by_query[query]]
             for query in queries if query in by_query}
            for by_query in labels.offers
        ],
    }
