#!/usr/bin/env python
"""Write a model as one file that runs without this project: ONNX, or a program of torch.export.

    pip install -e '.[export]'
    python tools/export.py --checkpoint FILE --format onnx --output FOLDER [--config-file FILE] \\
        [--half] [--threshold 0.3] [--check IMAGE ...] [key=value ...]

FOLDER gets model.onnx, or model.pt2 with --format torch: any number of images of any size in, boxes
out; normalisation and post-processing are inside, and the names of the classes, the threshold and
the preprocessing are in the metadata (docs/deploy.md). A checkpoint's own config is the default.
Without a checkpoint the weights are random, which is enough to measure times.

--half computes in float16 what keeps its accuracy there, with weights of half the size. --check
compares with the model itself on pictures; in float32 all detections above 0.05 have to be the
same.
"""

import argparse
import copy
import json
import os
import sys
import time

import _start
import torch

import projects.stageinteractor as project
from projects.stageinteractor.config.overrides import given_keys
from projects.stageinteractor.config.portable_config import portable_config
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.files import prepare_output, write_durably
from projects.stageinteractor.inference import load_detector, open_model
from projects.stageinteractor.inference.export.agreement import compare
from projects.stageinteractor.inference.export.exported_model import SUFFIXES
from projects.stageinteractor.inference.export.graph import DetectionGraph
from projects.stageinteractor.inference.export.writers import onnx_bytes, program_bytes, trace
from projects.stageinteractor.inference.inputs import to_array
from projects.stageinteractor.inference.opening import OpenedModel, make_detector

WRITERS = {"onnx": onnx_bytes, "torch": program_bytes}
FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
START = time.perf_counter()


def describe(opened: OpenedModel, args: argparse.Namespace) -> dict[str, str]:
    """The metadata of the file, all of it text. Raises UserError."""
    model, cfg, categories = opened
    config = portable_config(cfg, categories)
    if not config:
        raise UserError(
            "the preprocessing of the test images cannot be written into the file: "
            "dataloader.test.mapper has other parts than Detectron2's"
        )
    return {
        "class_names": json.dumps([item["name"] for item in categories]),
        "categories": json.dumps(categories),
        "score_threshold": f"{args.threshold:g}",
        "image_format": cfg.dataloader.test.mapper.image_format,
        "size_divisibility": str(model.size_divisibility),
        "precision": "float16" if args.half else "float32",
        "device": cfg.train.device,
        "config": config,
        "producer": f"stageinteractor {project.__version__}, torch {torch.__version__}",
    }


def say(step: str):
    """Print to stderr which step begins, since a step may take minutes."""
    print(f"{time.perf_counter() - START:4.0f} s: {step}", file=sys.stderr, flush=True)


def export(args: argparse.Namespace):
    """Write the file.

    Raises:
        UserError: the model cannot be exported, or something given is not usable.
        OSError: the file cannot be written.
    """
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold:g}: scores are between 0 and 1")
    if (args.checkpoint or "").endswith(SUFFIXES):
        raise UserError(f"{args.checkpoint} is exported already: give its checkpoint")
    for path in filter(lambda path: not os.path.isfile(path), args.check):
        hint = ": overrides come after another option" if "=" in path else ""
        raise UserError(f"no picture {path}{hint}")
    pictures = {path: to_array(path) for path in args.check}
    overrides = list(args.overrides)
    if "train.device" not in given_keys(overrides):
        overrides.append("train.device=cpu")
    opened = open_model(args.checkpoint, args.config_file, overrides)
    if not args.checkpoint:
        print("no --checkpoint: the weights are random", file=sys.stderr)
    # The graph rounds weights, and samples differently.
    model = copy.deepcopy(opened.model) if pictures else opened.model
    graph = DetectionGraph(model, half=args.half)
    description = describe(opened, args)
    path = prepare_output(args.output, FILES[args.format]) / FILES[args.format]
    say("tracing the model")
    program = trace(graph)
    say(f"translating it into {FILES[args.format]}")
    content = WRITERS[args.format](program, description)
    write_durably(str(path), lambda file: file.write(content))
    print(f"{path}: {len(content) / 1e6:.1f} MB, {description['precision']}")
    say("loading the file")
    exported = load_detector(path, trusted=True)  # which shows that it can be run
    detector = make_detector(opened) if pictures else None
    for name, picture in pictures.items():
        say(f"comparing both on {name}")
        result = compare(detector(picture), exported(picture))
        print(
            f"{name}: {result.pairs} detections above 0.05 in both, {result.lone} in one alone; "
            f"boxes differ by {result.box_pixels:.2g} pixels at most, scores by {result.score:.2g}"
        )
        if not (args.half or result.holds):
            raise UserError(f"the exported file does not agree with the model on {name}")


@_start.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="default: the checkpoint's own")
    parser.add_argument("--checkpoint", metavar="FILE")
    parser.add_argument("--format", required=True, choices=FILES)
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--half", action="store_true", help="half precision")
    parser.add_argument("--threshold", type=float, default=0.3, metavar="SCORE",
                        help="for the metadata; the file returns all scores (%(default)s)")
    parser.add_argument("--check", nargs="+", default=[], metavar="IMAGE",
                        help="compare with the model on these")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    export(args)


if __name__ == "__main__":
    main()
