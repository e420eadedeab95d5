"""Detections beside the ground truth: pictures of what is right and wrong, and counts of it."""

from collections import Counter
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tabulate import tabulate

from ..data import read_picture
from ..data.coco_file import id_order
from ..drawing.labelled_boxes import draw_boxes, separate_labels
from ..drawing.style import make_grid, shown, spread
from .mistakes import FALSE, LEAST_IOU, MISSED, Judged, count_outcomes

# Colour, and name in the legend. Colour-blind readers can tell these apart, also on photographs.
OUTCOMES = {
    **dict.fromkeys(("found", "correct"), ("#56B4E9", "found")),
    "missed": ("#F0E442", "missed"),
    **dict.fromkeys(FALSE, ("#E69F00", "false positive")),
    "confused": ("#CC79A7", "confused with another class"),
    "crowd": ("#BBBBBB", "crowd, not counted"),
}
PAIRS_IN_ROW, PANEL, DPI = 2, 3.2, 150  # PANEL in inches
CONFUSIONS = 20  # the most frequent pairs of classes, in the table


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
    columns = 2 * min(PAIRS_IN_ROW, len(chosen))
    figure, grid = make_grid(aspects, columns, per_image=2, panel=PANEL, dpi=DPI)
    legend = {}
    for (left, right), key in zip(grid.reshape(-1, 2), chosen):
        path, image = folder / images[key]["file_name"], judged[key]
        pixels = read_picture(str(path), "RGB")
        for axes, items in ((left, image.objects), (right, image.detections)):
            colors = [OUTCOMES[outcome][0] for _, outcome in items]
            legend.update(dict(OUTCOMES[outcome] for _, outcome in items))
            labels = [label(item, names) for item, _ in items]
            draw_boxes(axes, pixels, [item["bbox"] for item, _ in items], labels, colors)
        counts = Counter(outcome for _, outcome in image.objects + image.detections)
        title = f"{shown(path.name, 60)}\nground truth: {len(image.objects)}"
        left.set_title(f"{title}, {counts[MISSED]} missed", fontsize=8, loc="left")
        false = sum(counts[outcome] for outcome in FALSE)
        title = f"scores from {threshold:g}: {len(image.detections)}, {false} false"
        right.set_title(f"{title}, {len(image.confusions)} confused", fontsize=8, loc="left")
    if legend:
        patches = [Patch(fc=color, ec="black", label=name) for color, name in legend.items()]
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


def describe_results(coco: dict, judged: dict[int, Judged], iou: float) -> str:
    """Make tables of the outcomes of each class that has any, and of confused classes."""
    names, counts = names_by_id(coco), count_outcomes(judged.values())
    shares = "found", "confused", MISSED
    header = ["class", "objects", *shares, *(f"false: {name}" for name in FALSE)]
    rows = []
    for key, name in names.items():
        numbers = [counts[key, outcome] for outcome in (*shares, *FALSE)]
        if any(numbers):
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
    ).most_common(CONFUSIONS)
    if pairs:
        rows = [[*pair, number] for pair, number in pairs]
        header = ["truth", "predicted", "objects"]
        text.append(tabulate(rows, header, disable_numparse=[0, 1]))
    return "\n\n".join(text)
