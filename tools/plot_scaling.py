#!/usr/bin/env python
"""Measure how the decoder's cost grows, and draw it in one plot.

    python tools/plot_scaling.py --output FILE.png [--json FILE] [--threads N] [--runs R]
        [--config-file FILE] [key=value ...]

Against the number of queries, image size, batch and number of objects, one at a time; the others
are those of the middle point, 100 queries and one image of 800 x 1216 pixels with 20 objects.
Costs are those of tools/benchmark.py, divided by the cost of the middle point. Takes ten minutes.
"""

import argparse
import json
from pathlib import Path
from typing import Callable, Dict, List

import _start
import benchmark
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from projects.stageinteractor.errors import UserError
from projects.stageinteractor.drawing.style import palette

HEIGHT, WIDTH = benchmark.SIZE
PIXELS = HEIGHT * WIDTH
SWEEPS = {  # values; the middle point is among them
    "queries": (50, 100, 200, 300, 600, 900),
    "megapixels": (0.25, 0.5, 1, 1.5, 2),  # times those of the middle point
    "batch": (1, 2, 4, 8),
    "objects": (1, 5, 20, 100, 250, 500),
}
MIDDLE = {"queries": 100, "megapixels": 1, "batch": 1, "objects": 20}
COMMANDS = {
    "queries": ("forward", "train-step", "assign"),
    "megapixels": ("forward", "train-step"),
    "batch": ("forward", "train-step", "assign"),
    "objects": ("train-step", "assign"),
}
TICKS = 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20
NAMES = {"forward": "forward", "train-step": "training step", "assign": "labels"}


def arguments(command: str, sweep: str, value: float) -> List[str]:
    """For tools/benchmark.py, at a point of a sweep."""
    point = {**MIDDLE, sweep: value}
    scale = point["megapixels"] ** 0.5
    size = [str(round(side * scale / 32) * 32) for side in (HEIGHT, WIDTH)]
    given = [command, "--batch", str(point["batch"]), "--size", *size]
    if command != "forward":
        given += ["--objects", str(point["objects"])]
    return [*given, f"model.query_generator.num_queries={point['queries']}"]


def measure_sweeps(measure: Callable[[List[str]], dict]) -> Dict[str, Dict[str, List[float]]]:
    """Cost at every point, in multiples of the yardstick: of each sweep, of each command."""
    middle = {}
    costs: Dict[str, Dict[str, List[float]]] = {}
    for sweep, values in SWEEPS.items():
        costs[sweep] = {}
        for command in COMMANDS[sweep]:
            found = costs[sweep][command] = []
            for value in values:
                at_middle = value == MIDDLE[sweep]
                if at_middle and command in middle:
                    found.append(middle[command])
                    continue
                found.append(measure(arguments(command, sweep, value))["ratio_to_sgemm2048"])
                if at_middle:
                    middle[command] = found[-1]
                print(f"{command}, {sweep} {value}: {found[-1]:.3f}", flush=True)
    return costs


def plot_sweep(axes: Axes, sweep: str, costs: Dict[str, List[float]]):
    """Costs against one quantity on logarithmic axes, and what proportional growth would be."""
    values = SWEEPS[sweep]
    middle = values.index(MIDDLE[sweep])
    shown = [value * PIXELS / 1e6 for value in values] if sweep == "megapixels" else values
    for color, (command, name) in zip(palette(len(NAMES)), NAMES.items()):
        if command in costs:
            relative = [cost / costs[command][middle] for cost in costs[command]]
            axes.plot(shown, relative, color=color, marker="o", label=name)
    axes.plot(shown, [value / values[middle] for value in values], "k:", lw=1, label="proportional")
    axes.set(xscale="log", yscale="log", xlabel=sweep)
    axes.set_xticks(shown, [f"{value:.3g}" for value in shown], rotation=45)
    axes.set_yticks(TICKS, [f"{value:g}" for value in TICKS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def plot(costs: Dict[str, Dict[str, List[float]]], path: str):
    """All sweeps side by side."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, (sweep, found) in zip(figure.subplots(1, len(costs), sharey=True), costs.items()):
        plot_sweep(axes, sweep, found)
    figure.axes[0].set_ylabel("cost, of the middle point")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)


@_start.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, metavar="FILE.png")
    parser.add_argument("--json", metavar="FILE", help="where the costs go as well")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--runs", type=int, default=3, metavar="R", help="default: 3")
    parser.add_argument("--config-file", default=benchmark.CONFIG, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    common = ["--config-file", args.config_file, "--runs", str(args.runs)]
    common += ["--threads", str(args.threads)]

    def measure(point: List[str]) -> dict:
        given = [point[0], *common, *point[1:], *args.overrides]
        return benchmark.benchmark(benchmark.build_parser().parse_args(given))

    for path in filter(None, (args.output, args.json)):
        try:
            Path(path).touch()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
    costs = measure_sweeps(measure)
    if args.json:
        Path(args.json).write_text(json.dumps({"sweeps": SWEEPS, "costs": costs}, indent=1) + "\n")
    plot(costs, args.output)


if __name__ == "__main__":
    main()
