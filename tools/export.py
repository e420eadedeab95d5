#!/usr/bin/env python
"""Write a model that runs without this project: for ONNX, for OpenVINO or for torch.

    pip install -e '.[export]'
    python tools/export.py --checkpoint FILE --format onnx --output FOLDER [--config-file FILE] \\
        [--half | --int8] [--threshold 0.3] [--check IMAGE ...] [key=value ...]

FOLDER gets model.onnx; with --format openvino, model.xml and model.bin; with --format torch,
model.pt2, a program of torch.export. Any number of images of any size in, boxes out; normalisation
and post-processing are inside, and the names of the classes, the threshold and the preprocessing
are in the metadata (docs/deploy.md). A checkpoint's own config is the default. Without a checkpoint
the weights are random, which is enough to measure times.

--half computes in float16 what keeps its accuracy there, with weights of half the size. --int8
computes the linear layers of an ONNX model in int8, with weights of a quarter of the size. --check
compares with the model itself on pictures; in float32 all detections above 0.05 have to be the
same. An ONNX model is compared in every runtime that is installed, of onnxruntime on the CPU and on
CUDA, TensorRT and DirectML (both by onnxruntime), and OpenVINO; the others are named.
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
from projects.stageinteractor.inference.export.exported_model import SUFFIXES, each_runtime
from projects.stageinteractor.inference.export.graph import DetectionGraph
from projects.stageinteractor.inference.export.writers import (
    onnx_files,
    openvino_files,
    program_files,
    trace,
)
from projects.stageinteractor.inference.inputs import to_array
from projects.stageinteractor.inference.opening import OpenedModel, make_detector

FORMATS = {  # writers, and the first of their files
    "onnx": (onnx_files, "model.onnx"),
    "openvino": (openvino_files, "model.xml"),
    "torch": (program_files, "model.pt2"),
}
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
        "precision": "int8" if args.int8 else "float16" if args.half else "float32",
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
    if args.int8 and args.format != "onnx":
        raise UserError(f"--int8 is for --format onnx, not {args.format}")
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
    write, first = FORMATS[args.format]
    path = prepare_output(args.output, first) / first
    say("tracing the model")
    program = trace(graph)
    say(f"translating it into {first}")
    for name, content in write(program, description).items():
        write_durably(str(path.with_name(name)), lambda file, content=content: file.write(content))
        print(f"{path.with_name(name)}: {len(content) / 1e6:.1f} MB, {description['precision']}")
    say("loading the file")
    exported = load_detector(path, trusted=True)  # which shows that it can be run
    if not pictures:
        return
    detector = make_detector(opened)
    expected = {name: detector(picture) for name, picture in pictures.items()}
    is_onnx = args.format == "onnx"
    for runtime, run in each_runtime(path) if is_onnx else [(args.format, exported.model.run)]:
        if run is None:
            print(f"{runtime}: not installed, not compared")
            continue
        exported.model.run = run
        for name, picture in pictures.items():
            say(f"comparing {runtime} on {name}")
            result = compare(expected[name], exported(picture))
            print(
                f"{runtime}, {name}: {result.pairs} detections above 0.05 in both, {result.lone} "
                f"in one alone; boxes differ by {result.box_pixels:.2g} pixels at most, scores by "
                f"{result.score:.2g}"
            )
            if not (args.half or args.int8 or result.holds):
                raise UserError(f"{path} does not agree with the model on {name} in {runtime}")


@_start.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="default: the checkpoint's own")
    parser.add_argument("--checkpoint", metavar="FILE")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, metavar="FOLDER")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--half", action="store_true", help="half precision")
    precision.add_argument("--int8", action="store_true", help="linear layers in int8, for ONNX")
    parser.add_argument("--threshold", type=float, default=0.3, metavar="SCORE",
                        help="for the metadata; the file returns all scores (%(default)s)")
    parser.add_argument("--check", nargs="+", default=[], metavar="IMAGE",
                        help="compare with the model on these")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    export(args)


if __name__ == "__main__":
    main()
