"""Detections beside the ground truth: pictures of what is right and wrong, and counts of it."""

from collections import Counter
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tabulate import tabulate

from ..data import read_picture
from ..data.coco_file import id_order
from ..data.image_checks import explain_missing
from ..drawing.labelled_boxes import draw_boxes, separate_labels
from ..drawing.style import make_grid, shown, spread
from ..errors import UserError
from .mistakes import (
    CONFUSED,
    CORRECT,
    CROWD,
    FALSE,
    FOUND,
    LEAST_IOU,
    MISSED,
    Judged,
    count_outcomes,
)

# Colour, and name in the legend. Colour-blind readers can tell these apart, also on photographs.
OUTCOMES = {
    FOUND: ("#56B4E9", "found"),
    CORRECT: ("#56B4E9", "found"),
    MISSED: ("#F0E442", "missed"),
    **dict.fromkeys(FALSE, ("#E69F00", "false positive")),
    CONFUSED: ("#CC79A7", "confused with another class"),
    CROWD: ("#BBBBBB", "crowd, not counted"),
}
PAIRS_IN_ROW, PANEL, DPI = 2, 3.2, 150  # PANEL in inches
CONFUSIONS = 20  # pairs of classes in the table


def choose(judged: dict[int, Judged], count: int, order: str) -> list[int]:
    """Choose ids of images: those with most errors first, or evenly over the data set."""
    ids = sorted(judged, key=id_order)
    if order == "spread":
        return spread(ids, count)
    return sorted(ids, key=lambda key: -judged[key].num_errors)[:count]


def draw_results(
    coco: dict, judged: dict[int, Judged], chosen: list[int], folder: Path, threshold: float
) -> Figure:
    """Draw ground truth on the left, predictions on the right, boxes coloured by outcome.

    Args:
        coco: ground truth.
        judged: outcomes by the id of the image, see `mistakes.judge`.
        chosen: ids of the images to draw.
        folder: of the images; file names in `coco` are relative to it.
        threshold: least score of the predictions, for the titles.

    Raises:
        UserError: an image is missing or cannot be read.
    """
    names = names_by_id(coco)
    images = {image["id"]: image for image in coco["images"]}
    aspects = [images[key]["height"] / images[key]["width"] for key in chosen]
    in_row = min(PAIRS_IN_ROW, len(chosen))
    rows = [max(aspects[i:i + in_row]) for i in range(0, len(chosen), in_row)]
    figure, grid = make_grid(rows, 2 * in_row, panel=PANEL, dpi=DPI)
    drawn = set()
    for (left, right), key in zip(grid.reshape(-1, 2), chosen):
        path, image = folder / images[key]["file_name"], judged[key]
        if not path.is_file():
            missing = [i for i in images.values() if not (folder / i["file_name"]).is_file()]
            finding = explain_missing("", missing, str(folder), (), len(images))[0]
            raise UserError(f"{finding.what}; --images gives their folder")
        pixels = read_picture(str(path), "RGB")
        for axes, items in ((left, image.objects), (right, image.detections)):
            labels = [label(item, names) for item, _ in items]
            colors = [OUTCOMES[outcome][0] for _, outcome in items]
            drawn.update(outcome for _, outcome in items)
            draw_boxes(axes, pixels, [item["bbox"] for item, _ in items], labels, colors)
        title = f"{shown(path.name, 60)}\nground truth: {outcomes(image.objects, (MISSED,))}"
        left.set_title(title, fontsize=8, loc="left")
        title = f"scores from {threshold:g}: {outcomes(image.detections, FALSE)}"
        right.set_title(title, fontsize=8, loc="left")
    legend = {OUTCOMES[outcome]: None for outcome in OUTCOMES if outcome in drawn}
    patches = [Patch(fc=color, ec="black", label=name) for color, name in legend]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=9)
    figure.draw_without_rendering()  # from now on panels have their final size
    for axes in grid.flat:
        separate_labels(axes)
    return figure


def names_by_id(coco: dict) -> dict:
    """Map ids of categories, of any kind, to names that can be printed."""
    return {category["id"]: shown(category["name"]) for category in coco["categories"]}


def label(item: dict, names: dict) -> str:
    """Name the class of an object if there are several classes, and a prediction's score."""
    name = names.get(item["category_id"], str(item["category_id"])) if len(names) > 1 else ""
    return f"{name} {item['score']:.2f}".strip() if "score" in item else name


def outcomes(items: list[tuple[dict, str]], wrong: tuple[str, ...]) -> str:
    """Tell how many boxes there are, and how many of them are confused or wrong."""
    counts = Counter(outcome for _, outcome in items)
    parts = [f"{counts[CONFUSED]} confused"] if counts[CONFUSED] else []
    number = sum(counts[outcome] for outcome in wrong)
    parts += [f"{number} {MISSED if wrong == (MISSED,) else 'false'}"] if number else []
    return f"{len(items)}, {', '.join(parts)}" if parts else str(len(items))


def describe_results(coco: dict, judged: dict[int, Judged], iou: float) -> str:
    """Make tables of the outcomes of each class that has any, and of confused classes."""
    names, counts = names_by_id(coco), count_outcomes(judged.values())
    shares = FOUND, CONFUSED, MISSED
    header = ["class", "objects", *shares, *(f"false: {name}" for name in FALSE)]
    rows = []
    for key, name in names.items():
        if counts[key]:
            numbers = [counts[key][outcome] for outcome in (*shares, *FALSE)]
            rows.append([name, sum(numbers[:len(shares)]), *numbers])
    if len(rows) != 1:
        rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, len(header)))])
    text = [
        tabulate(rows, header, disable_numparse=[0]),
        f"found: a detection of the class has an IoU of {iou:g} or more. duplicate: the object is "
        f"already found.\nmisplaced: the IoU with an object of the class is {LEAST_IOU:g} or more, "
        "but too small.",
    ]
    pairs = Counter(
        (names[truth["category_id"]], names[found["category_id"]])
        for image in judged.values() for truth, found in image.confusions
    ).most_common()
    if pairs:
        rows = [[*pair, number] for pair, number in pairs[:CONFUSIONS]]
        text.append(tabulate(rows, ["truth", "predicted", "objects"], disable_numparse=[0, 1]))
    if len(pairs) > CONFUSIONS:
        text.append(f"pairs of classes omitted: {len(pairs) - CONFUSIONS}")
    return "\n\n".join(text)
