"""Curves of training: losses, AP and learning rate of one or several runs."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..errors import UserError
from ..files import read_text
from .style import INKS, palette, shown

STYLES = ("-", "--", ":")
LOSS_RANGE = 300  # the largest ratio between the ends of a logarithmic axis


def read_metrics(path: Path) -> dict[int, dict]:
    """Read Detectron2's metrics.json as {iteration: {metric: number}}, sorted by iteration.

    Raises:
        UserError: the file is missing or holds no metrics.
    """
    history = defaultdict(dict)
    for line in read_text(path).splitlines():
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:  # a run was killed while writing, and perhaps resumed
            continue
        if isinstance(metrics, dict) and "iteration" in metrics:
            # A resumed run may repeat iterations, and its values count.
            history[metrics["iteration"]].update(metrics)
    if not history:
        raise UserError(f"{path} holds no metrics: it should have one JSON object a line")
    return dict(sorted(history.items()))


def draw_training(paths: Sequence[Path]) -> Figure:
    """Curves of several metrics.json. A colour stands for a run, a line style for a metric.

    Raises:
        UserError: a file is missing or holds no metrics.
    """
    figure = Figure(figsize=(15, 8), dpi=100, layout="constrained")
    panels = figure.subplots(2, 3)
    colors = palette(len(paths), INKS)
    for color, path in zip(colors, paths):
        history = read_metrics(path)
        for axes, (title, chosen) in zip(panels.flat, choose_metrics(history).items()):
            axes.set(title=title, xlabel="iteration")
            for style, metric in zip(STYLES, chosen):
                draw_curve(axes, history, metric, c=color, ls=style, label=metric)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        explain_styles(axes)
    for axes in panels[0, :2]:  # losses fall by orders of magnitude, and some start near zero
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom=max(bottom, top / LOSS_RANGE))
    runs = [Line2D([], [], c=color, lw=3) for color in colors]
    names = [shown(str(path.parent), 60) for path in paths]
    figure.legend(runs, names, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def choose_metrics(history: dict[int, dict]) -> dict[str, list[str]]:
    """The metrics of each panel, by its title; a run may lack some of them."""
    metrics = sorted(set().union(*history.values()))
    stages = [int(stage) for stage in re.findall(r"\bstage(\d+)_loss_", " ".join(metrics))]
    last = f"stage{max(stages, default=0)}_loss_"
    return {
        "total loss": ["total_loss"],
        "losses of the last stage": [last + part for part in ("cls", "bbox", "giou")],
        "AP (%)": [name for name in metrics if name.endswith(("bbox/AP", "bbox/AP50"))],
        "labels, as a share of the matches": [
            f"labels/{part}" for part in ("kept", "dropped", "gained")
        ],
        "norm of the gradient": ["grad_norm"],
        "learning rate": ["lr"],
    }


def draw_curve(axes: Axes, history: dict[int, dict], metric: str, **style):
    """Draw the finite values of one metric against the iteration."""
    points = [(i, row[metric]) for i, row in history.items()
              if math.isfinite(row.get(metric, math.nan))]
    if points:
        axes.plot(*zip(*points), marker="." if len(points) < 30 else "", **style)


def explain_styles(axes: Axes):
    """Add a legend if there are several line styles, or a note if there is no line."""
    styles = {line.get_linestyle(): line.get_label() for line in axes.lines}
    if len(styles) > 1:
        handles = [Line2D([], [], c="black", ls=style) for style in styles]
        axes.legend(handles, styles.values(), fontsize=8)
    elif not styles:
        axes.text(0.5, 0.5, "no value yet", ha="center", transform=axes.transAxes)
