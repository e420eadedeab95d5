#!/usr/bin/env python
"""Measure the time and the memory of one part of training or evaluation on random input.

    python tools/benchmark.py {forward,train-step,sample,assign,deploy,data,eval} [--threads N]
        [--runs R] [--config-file FILE] [key=value ...]

forward     [--batch B] [--size H W] [--compiled] [--compare]
            the decoder on the feature maps of B images, without gradients
train-step  [--batch B] [--size H W] [--objects T] [--compiled] [--compare]
            the decoder, the losses and all gradients, including those of the feature maps
sample      [--batch B] [--size H W] [--compare]
            feature sampling of one stage with its gradients, from the neck's feature maps on
assign      [--batch B] [--size H W] [--objects T]
            matching and label assignment of all stages
deploy      [--checkpoint FILE] [--batch B] [--size H W]
            the whole detector, from pixels to boxes: "eager", as train_net.py --eval-only runs it;
            "compiled", its backbone and decoder stages by torch.compile; "program", as exported by
            torch.export; "ONNX", by onnxruntime. Without a checkpoint, the weights are random; with
            one, its own config is the default
data        [--images N]
            the training loader on N photographs (elapsed time), and decoding and mapping alone
eval        [--images N] [--compare]
            COCO's metrics of N images with 100 detections each; takes no config

--compare also measures the plain way: grid_sample on each map; pycocotools. --compiled runs the
decoder stages by torch.compile.

On a CPU, times are CPU time of all threads; elsewhere, time until the device has finished. The runs
take turns with a yardstick, a 2048 x 2048 x 2048 product of matrices in float32. Where machines
differ or are shared, the ratio of the two says more than a time. Peak memory is what torch
allocates on top of what is there before the run: input, weights and, in train-step, the gradients
of weights. Threads that spin while they wait count as time, so --threads 1 compares torch and
onnxruntime best.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler reports its start and stop

import _start
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from projects.stageinteractor.analysis import benchmarks
from projects.stageinteractor.analysis.timing import device_name
from projects.stageinteractor.config.device import keep_freed_memory, select_device
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.config.building import explain_misfits
from projects.stageinteractor.inference import open_model
from projects.stageinteractor.inference.export.exported_model import SUFFIXES

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "projects/stageinteractor/configs/stageinteractor_r50_12ep.py")
SIZE = 800, 1216
OPTIONS = {  # of each command, with defaults; False for switches
    "forward": {"batch": 1, "size": SIZE, "compiled": False, "compare": False},
    "train-step": {"batch": 1, "size": SIZE, "objects": 20, "compiled": False, "compare": False},
    "sample": {"batch": 1, "size": SIZE, "compare": False},
    "assign": {"batch": 2, "size": SIZE, "objects": 20},
    "deploy": {"batch": 1, "size": SIZE},
    "data": {"images": 32},
    "eval": {"images": 5000, "compare": False},
}


def load(args: argparse.Namespace, part: str) -> DictConfig:
    """Load the config, which must have the ``part`` that is measured; else UserError."""
    file = args.config_file or CONFIG
    cfg = load_config(file, args.overrides)
    require_part(cfg, part, file)
    cfg.train.device = select_device(cfg.train.device)
    return cfg


def require_part(cfg: DictConfig, part: str, file: str):
    """Raises UserError if the config of a file has no such part to measure."""
    if OmegaConf.select(cfg, part) is None:
        raise UserError(f"{file} has no {part} to measure: give another config")


def measure(args: argparse.Namespace) -> dict:
    """Measure what the arguments say. Raises UserError if one of them cannot be used."""
    for name in ("threads", "runs", "batch", "size", "objects", "images"):
        given = getattr(args, name, None)
        if given is not None and np.min(given) < 1:
            raise UserError(f"--{name} must be 1 or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()
    options, device = {name: getattr(args, name) for name in OPTIONS[args.command]}, "cpu"
    if args.command == "eval":
        result = benchmarks.measure_evaluation(args.runs, **options)
    elif args.command == "data":
        result = benchmarks.measure_data(load(args, "dataloader.train"), args.runs, **options)
    elif args.command == "deploy":
        keep_freed_memory()
        if str(args.checkpoint).endswith(SUFFIXES):
            raise UserError(f"{args.checkpoint} is exported already: give its checkpoint")
        config_file = args.config_file or (None if args.checkpoint else CONFIG)
        model, cfg, _ = open_model(args.checkpoint, config_file, args.overrides)
        require_part(cfg, "model.decoder", config_file or args.checkpoint)
        if not args.checkpoint:
            benchmarks.randomize_zero_weights(model)
        result, device = benchmarks.measure_deployed(model, args.runs, **options), cfg.train.device
    else:
        keep_freed_memory()
        cfg = load(args, "model.decoder")
        device = cfg.train.device
        with explain_misfits("model"):
            works = benchmarks.WORKS[args.command](cfg, **options)
        result = benchmarks.measure_decoder(works, args.runs, device)
    return {
        "command": args.command,
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "runs": args.runs,
        **result,
        # Where torch.compile is switched off, the code runs as it is.
        "compiled": torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0,
    }


def report(result: dict):
    """Print the result of `measure`."""
    rows, lines = result["rows"], []
    for name, row in rows.items():
        if "missing" in row:
            lines.append([name, None, row["missing"]])
            continue
        spread = "{:.2f} to {:.2f}".format(*row["spread_ms"])
        memory = row["peak_memory_bytes"] and row["peak_memory_bytes"] / 1e6
        speed = rows["eager"]["median_ms"] / row["median_ms"] if "eager" in rows else None
        lines.append([name, row["median_ms"], spread, row["ratio"], memory, speed])
    print(
        "{command} on {device}, torch {torch}, threads: {threads}, runs: {runs}, compiled: "
        "{compiled}\nyardstick: {yardstick_ms:.1f} ms\n".format(**result)
    )
    header = ["", "median, ms", "quartiles", "ratio to yardstick", "peak memory, MB", "speed"]
    print(tabulate(lines, header, floatfmt=".2f", missingval="-"))
    if "plain" in rows:
        print(f"quotient: {rows['plain']['median_ms'] / rows['ours']['median_ms']:.4g}")
    for name in ("largest_difference", "images_per_second", "decode_ms", "map_ms"):
        if name in result:
            print(f"{name.replace('_', ' ')}: {result[name]:.4g}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, options in OPTIONS.items():
        option = commands.add_parser(command).add_argument
        option("--threads", type=int, metavar="N", help="default: torch's")
        option("--runs", type=int, default=7, metavar="R", help="%(default)s")
        for name, default in options.items():
            if default is False:
                option(f"--{name}", action="store_true")
            else:
                several = {"nargs": 2, "metavar": ("H", "W")} if name == "size" else {}
                option(f"--{name}", type=int, default=default, help="%(default)s", **several)
        if command == "deploy":
            option("--checkpoint", metavar="FILE")
        if command != "eval":
            option("--config-file", metavar="FILE")
            option("overrides", nargs="*", metavar="key=value")
    return parser


@_start.command
def main(argv: list[str] | None = None):
    report(measure(make_parser().parse_args(argv)))


if __name__ == "__main__":
    main()
