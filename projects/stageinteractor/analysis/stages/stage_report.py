"""The figures of `stage_metrics` as tables, as a chart and as JSON."""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from ...drawing.style import INKS
from .stage_metrics import LEAST_SCORE, QUANTILES

FILES = ("stages.json", "stages.png")
METRICS = ("AP", "AP50", "AP75", "AR")
LABELS = ("kept", "dropped", "gained")
GROUPS = {"all": "all queries", "detected": f"queries that score {LEAST_SCORE:g} or more"}
MIDDLE = QUANTILES.index(0.5)


def write_report(result: dict, output: Path):
    """Write `FILES` into a folder, and print the tables.

    Args:
        result: see `analyze_stages`; any other entries go into the JSON file as well.
    """
    figures, picture = (output / name for name in FILES)
    # JSON has no NaN, so figures without a value become null.
    text = json.dumps(json.loads(json.dumps(result), parse_constant=lambda name: None), indent=1)
    figures.write_text(text + "\n")
    draw_stages(result["stages"]).savefig(picture)
    for title, table, digits in stage_tables(result):
        print(f"\n{title}\n\n{tabulate(table, 'firstrow', floatfmt=f'.{digits}f')}")
    print(f"\n{figures} and {picture} written")


def stage_tables(result: dict) -> list[tuple[str, list[list], int]]:
    """Make a title, rows with a header, and a number of digits for each table."""
    rows = [
        [index, *(stage["metrics"][name] for name in METRICS),
         *(100 * stage["labels"][name] for name in LABELS), 100 * stage["time"]]
        for index, stage in enumerate(result["stages"])
    ]
    header = ["stage", *METRICS, *(f"labels {name}" for name in LABELS), "time up to it"]
    tables = [(f"Each stage alone, {result['images']} images, %", [header, *rows], 1)]
    header = ["stages", "boxes", "mean IoU", *(f"{100 * q:g} %" for q in QUANTILES)]
    for group, name in GROUPS.items():
        rows = []
        for index, stage in enumerate(result["stages"][:-1]):
            change = stage["to_next"][group]
            medians = (change[key]["quantiles"][MIDDLE] for key in ("shift", "scale"))
            iou = change["iou"]["mean"], *change["iou"]["quantiles"]
            rows.append([f"{index} to {index + 1}", change["boxes"], *iou, *medians])
        if rows:
            title = (
                f"Boxes from stage to stage, {name}: mean and quantiles of the IoU of a query's "
                "two boxes,\nmedian shift of the centre in units of sqrt(w h), median absolute "
                "change of log2 sqrt(w h)"
            )
            tables.append((title, [[*header, "shift", "scale"], *rows], 3))
    nms = {"-": result["stages"][-1]["metrics"], **result["nms"]}
    rows = [[threshold, *(found[name] for name in METRICS)] for threshold, found in nms.items()]
    title = "Last stage with non-maximum suppression, %"
    return [*tables, (title, [["NMS above IoU", *METRICS], *rows], 1)]


def draw_stages(stages: list[dict]) -> Figure:
    """Draw each stage's metrics, the IoU of its boxes with the next stage's, and its labels."""
    figure = Figure(figsize=(13, 4), dpi=110, layout="constrained")
    metrics, changes, labels = figure.subplots(1, 3)
    for axes in (metrics, changes, labels):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    for color, name in zip(INKS, METRICS):
        metrics.plot([stage["metrics"][name] for stage in stages], "o-", c=color, label=name)
    metrics.set(title="detections of each stage alone", ylabel="%", xlabel="stage")
    metrics.set(xticks=range(len(stages)), ylim=(0, None))
    metrics.legend(fontsize=8)
    draw_changes(changes, [stage["to_next"] for stage in stages[:-1]])
    draw_labels(labels, [stage["labels"] for stage in stages])
    return figure


def draw_changes(axes: Axes, steps: list[dict]):
    """Draw the median and the middle half of the IoU of each query's boxes in two stages."""
    low, high = QUANTILES.index(0.25), QUANTILES.index(0.75)
    for color, (group, name) in zip(INKS, GROUPS.items()):
        if any(step[group]["boxes"] for step in steps):
            quantiles = list(zip(*(step[group]["iou"]["quantiles"] for step in steps)))
            axes.plot(quantiles[MIDDLE], "o-", c=color, label=name)
            shade = {"color": color, "alpha": 0.2, "linewidth": 0}
            axes.fill_between(range(len(steps)), quantiles[low], quantiles[high], **shade)
    axes.set(title="boxes between stages: median, middle half")
    axes.set(ylabel="IoU of a query's two boxes", xlabel="stages", ylim=(0, 1.02))
    axes.set_xticks(range(len(steps)), [f"{step} to {step + 1}" for step in range(len(steps))])
    if axes.lines:
        axes.legend(fontsize=8, loc="lower right")


def draw_labels(axes: Axes, stages: list[dict]):
    """Draw the shares of labels in each stage."""
    for offset, (color, name) in enumerate(zip(INKS, LABELS), start=-1):
        places = [index + 0.27 * offset for index in range(len(stages))]
        shares = [100 * labels[name] for labels in stages]
        axes.bar(places, shares, width=0.25, color=color, label=name)
    axes.set(title="labels", ylabel="% of the one-to-one matches", xlabel="stage")
    axes.set(xticks=range(len(stages)), ylim=(0, 1.12 * axes.get_ylim()[1]))
    axes.legend(fontsize=8, loc="upper center", ncols=len(LABELS))
