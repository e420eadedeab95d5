#!/usr/bin/env python
"""Evaluate each decoder stage of a model alone, and measure how much boxes move between them.

    python tools/analyze_stages.py --config-file FILE --checkpoint FILE [--output FOLDER] \\
        [key=value ...]

The test set of the config is run once. Of every stage: the metrics of its detections alone, those
of the last being what tools/train_net.py --eval-only gives; how much the boxes of its queries
change to the next stage; which labels it would be given in training, for the test set's objects
and with this checkpoint (their shares while it trained are labels/* in metrics.json). Of the last
stage: the metrics after non-maximum suppression (supplement, section D).

Writes stages.json and stages.png; a folder that holds either is refused.
"""

import argparse
import json
from pathlib import Path
from collections.abc import Iterable

import _start
from detectron2.config import instantiate
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig
from tabulate import tabulate
from tqdm import tqdm

from projects.stageinteractor.config.building import (
    build_test_loader,
    load_dataset,
    load_resolved,
)
from projects.stageinteractor.files import prepare_output
from projects.stageinteractor.inference import open_model
from projects.stageinteractor.inference.opening import require_stages
from projects.stageinteractor.analysis.stage_metrics import (
    LEAST_SCORE,
    QUANTILES,
    StageEvaluator,
    analyze_stages,
)

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
FILES = ("stages.json", "stages.png")
METRICS = ("AP", "AP50", "AP75", "AR")
LABELS = ("kept", "dropped", "gained")
GROUPS = {"all": "all queries", "detected": f"queries that score {LEAST_SCORE:g} or more"}
LOW, MIDDLE, HIGH = (QUANTILES.index(quantile) for quantile in (0.25, 0.5, 0.75))


def build_test(cfg: DictConfig) -> tuple[Iterable, StageEvaluator]:
    """The loader of the test set, objects included, and the evaluator for it.

    Raises:
        UserError: the data set is missing, has other classes or no annotations.
    """
    dataset = load_dataset(cfg, "test")
    evaluator = instantiate(
        {**cfg.dataloader.evaluator, "_target_": StageEvaluator, "output_dir": None}
    )
    return build_test_loader(cfg, dataset), evaluator


def stage_table(result: dict) -> list[list]:
    """Metrics and shares of labels of each stage, in per cent."""
    rows = [
        [index, *(stage["metrics"][name] for name in METRICS),
         *(100 * stage["labels"][name] for name in LABELS)]
        for index, stage in enumerate(result["stages"])
    ]
    return [["stage", *METRICS, *(f"labels {name}" for name in LABELS)], *rows]


def change_table(result: dict, group: str) -> list[list]:
    """IoU, shift and change of size of the boxes of a group of queries from stage to stage."""
    rows = []
    for index, stage in enumerate(result["stages"][:-1]):
        change = stage["to_next"][group]
        row = [f"{index} to {index + 1}", change["boxes"], change["iou"]["mean"]]
        row += change["iou"]["quantiles"]
        rows.append(row + [change[name]["quantiles"][MIDDLE] for name in ("shift", "scale")])
    names = [f"{100 * quantile:g} %" for quantile in QUANTILES]
    return [["stages", "boxes", "mean IoU", *names, "shift", "scale"], *rows]


def nms_table(result: dict) -> list[list]:
    """Metrics of the last stage with and without non-maximum suppression."""
    nms = {"-": result["stages"][-1]["metrics"], **result["nms"]}
    rows = [[threshold, *(found[name] for name in METRICS)] for threshold, found in nms.items()]
    return [["NMS above IoU", *METRICS], *rows]


def show(title: str, table: list[list], digits: int):
    """Print a table whose first row is its header."""
    text = tabulate(table, "firstrow", floatfmt=f".{digits}f")
    print(f"\n{title}\n\n{text}")


def draw(result: dict) -> Figure:
    """Metrics of each stage alone, IoU of boxes with those of the next stage, shares of labels."""
    figure = Figure(figsize=(13, 4), dpi=110, layout="constrained")
    metrics, changes, labels = figure.subplots(1, 3)
    draw_metrics(metrics, result["stages"])
    draw_changes(changes, result["stages"])
    draw_labels(labels, result["stages"])
    for axes in (metrics, changes, labels):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def draw_metrics(axes: Axes, stages: list[dict]):
    """Metrics of each stage."""
    for color, name in zip(COLORS, METRICS):
        axes.plot([stage["metrics"][name] for stage in stages], "o-", c=color, label=name)
    axes.set(title="detections of each stage alone", ylabel="%", xlabel="stage")
    axes.set_xticks(range(len(stages)))
    axes.legend(fontsize=8)


def draw_changes(axes: Axes, stages: list[dict]):
    """Median and middle half of the IoU between each query's boxes in two stages."""
    steps = range(len(stages) - 1)
    for color, (group, name) in zip(COLORS, GROUPS.items()):
        if not any(stages[step]["to_next"][group]["boxes"] for step in steps):
            continue
        quantiles = [stages[step]["to_next"][group]["iou"]["quantiles"] for step in steps]
        low, middle, high = ([row[place] for row in quantiles] for place in (LOW, MIDDLE, HIGH))
        axes.plot(steps, middle, "o-", c=color, label=name)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(title="boxes between stages: median, middle half")
    axes.set(ylabel="IoU of a query's two boxes", xlabel="stages", ylim=(0, 1.02))
    axes.set_xticks(steps, [f"{step} to {step + 1}" for step in steps])
    if axes.lines:
        axes.legend(fontsize=8, loc="lower right")


def draw_labels(axes: Axes, stages: list[dict]):
    """Shares of the labels of each stage."""
    for offset, (color, name) in enumerate(zip(COLORS, LABELS), start=-1):
        shares = [100 * stage["labels"][name] for stage in stages]
        places = [index + 0.27 * offset for index in range(len(stages))]
        axes.bar(places, shares, width=0.25, color=color, label=name)
    axes.set(title="labels", ylabel="% of the one-to-one matches", xlabel="stage")
    axes.set_xticks(range(len(stages)))
    axes.set_ylim(top=1.12 * axes.get_ylim()[1])
    axes.legend(fontsize=8, loc="upper center", ncols=len(LABELS))


def without_nan(value):
    """A result for JSON, which knows no NaN: None in its place."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if value != value else value


def report(result: dict, output: Path):
    """Write the files, print the tables."""
    figures, picture = (output / name for name in FILES)
    figures.write_text(json.dumps(without_nan(result), indent=1) + "\n")
    draw(result).savefig(picture)
    show(f"Each stage alone, {result['images']} images, %", stage_table(result), 1)
    if len(result["stages"]) > 1:
        for group, name in GROUPS.items():
            show(f"Boxes from stage to stage, {name}", change_table(result, group), 3)
        print(
            "\nQuantiles of the IoU of a query's boxes in both stages. Medians of the shift of the "
            "centre,\nin units of sqrt(w h), and of the absolute change of log2 sqrt(w h)."
        )
    show("Last stage with non-maximum suppression, %", nms_table(result), 1)
    print(f"\n{figures} and {picture} written")


@_start.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument("--output", metavar="FOLDER", help="default: stages/ in train.output_dir")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    cfg = load_resolved(args.config_file, args.overrides, training=False)
    require_stages(cfg)
    loader, evaluator = build_test(cfg)
    model, *_ = open_model(args.checkpoint, cfg)
    for name in FILES:
        output = prepare_output(args.output or f"{cfg.train.output_dir}/stages", name)
    result = analyze_stages(model, tqdm(loader, "images", disable=None), evaluator)
    header = {
        "config": args.config_file,
        "checkpoint": args.checkpoint,
        "least_score": LEAST_SCORE,
        "quantiles": QUANTILES,
    }
    report({**header, **result}, output)


if __name__ == "__main__":
    main()
