#!/usr/bin/env python
"""Measure the time and the memory of one part of training or evaluation on random input.

    python tools/benchmark.py {forward,train-step,sample,assign,deploy,data,eval} [--threads N]
        [--runs R] [--json FILE] [--config-file FILE] [key=value ...]

forward     [--batch B] [--size H W] [--compiled] [--compare]
            the decoder on the feature maps of B images, without gradients
train-step  [--batch B] [--size H W] [--objects T] [--compiled] [--compare]
            the decoder, the losses and all gradients, those of the feature maps included
sample      [--batch B] [--size H W] [--compare]
            feature sampling of one stage with its gradients, from feature maps as the neck gives
assign      [--batch B] [--size H W] [--objects T]
            matching and label assignment of all stages
deploy      [--checkpoint FILE] [--batch B] [--size H W]
            the whole detector, from pixels to boxes: "eager", as train_net.py --eval-only runs it;
            "compiled", its backbone and the stages of its decoder by torch.compile; "program",
            torch.export's; "ONNX", by onnxruntime. Without a checkpoint, weights are random; with
            one, its own config is the default
data        [--images N]
            the training loader on N photographs, in time that passes; decoding and mapping alone
eval        [--images N] [--compare]
            COCO's metrics of N images with 100 detections each; takes no config

--compare measures the plain way as well: grid_sample on each map; pycocotools. --compiled runs the
stages of the decoder by torch.compile.

Times are CPU time of all threads on a CPU, else the time until the device is done. The yardstick, a
2048 x 2048 x 2048 product of matrices in float32, is measured in turn with the runs: the ratio of
both says more than a time where machines differ or are shared. Peak memory is torch's, above what
is there before the run: input, weights, and in train-step gradients of weights. Threads that spin
while they wait count as time: --threads 1 compares torch and onnxruntime best.
"""

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import tempfile
import time
from pathlib import Path
from collections.abc import Iterable

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler reports its start and stop

import _start
import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from torch import Tensor, nn
from torch.export import ExportedProgram

from projects.stageinteractor.data import coco_dataset
from projects.stageinteractor.data import read_image
from projects.stageinteractor.engine import evaluator
from projects.stageinteractor.config.device import keep_freed_memory, select_device
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.config.building import explain_misfits
from projects.stageinteractor.analysis.measure import (
    Work,
    device_name,
    make_photographs,
    matrix_product,
    measure,
    measure_rows,
    measure_times,
    random_boxes,
    random_detections,
    random_truth,
    summarize_times,
)
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference.export.exported_model import ExportedModel, load_onnx
from projects.stageinteractor.inference.export.writers import onnx_bytes, trace
from projects.stageinteractor.inference.export.graph import DetectionGraph
from projects.stageinteractor.inference import open_model
from projects.stageinteractor.modeling.boxes import corners_to_xyzr
from projects.stageinteractor.modeling.sampling import FeatureMaps
from projects.stageinteractor.modeling.targets import Targets

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "projects/stageinteractor/configs/stageinteractor_r50_12ep.py")


def wake(model: nn.Module) -> nn.Module:
    """Give a model random weights where training starts with zeros, and return it.

    Else all queries would sample the same points and generate the same filters.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def build_decoder(cfg: DictConfig) -> nn.Module:
    """The decoder with random weights."""
    return wake(instantiate(cfg.model.decoder)).to(cfg.train.device)


def variants(decoder: nn.Module, args: argparse.Namespace) -> dict[str, nn.Module]:
    """The decoder as it is and, with ``--compare``, one of the same weights with the plain maps."""
    found = {"ours": decoder}
    if args.compare:
        found["plain"] = copy.copy(decoder)
        found["plain"].make_pyramid = FeatureMaps
    return found


def random_maps(cfg: DictConfig, args: argparse.Namespace) -> list[Tensor]:
    """Feature maps as the neck gives them, of images padded to a multiple of the largest stride."""
    options = cfg.model.decoder
    pad = max(options.strides)
    height, width = (math.ceil(side / pad) * pad for side in args.size)
    return [
        torch.randn(args.batch, options.feature_dim, height // stride, width // stride,
                    device=cfg.train.device)
        for stride in options.strides
    ]


def initial_queries(cfg: DictConfig, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Content and positional vectors before the first stage."""
    generator = instantiate(cfg.model.query_generator).to(cfg.train.device)
    sizes = torch.tensor([args.size] * args.batch, device=cfg.train.device)
    content, xyzr = generator(sizes)
    return content.detach(), xyzr


def random_targets(cfg: DictConfig, args: argparse.Namespace) -> Targets:
    """The same number of objects in every image."""
    shape, (height, width) = (args.batch, args.objects), args.size
    targets = Targets(
        random_boxes(shape, args.size),
        torch.randint(cfg.model.decoder.num_classes, shape),
        torch.tensor([width, height] * 2, dtype=torch.float32).expand(args.batch, 1, 4),
        (args.objects,) * args.batch,
    )
    return Targets(*(t.to(cfg.train.device) for t in targets[:3]), targets.counts)


def forward(cfg: DictConfig, args: argparse.Namespace) -> dict[str, Work]:
    inputs = (*initial_queries(cfg, args), random_maps(cfg, args))

    def work(decoder: nn.Module) -> Work:
        return Work(torch.no_grad()(lambda: decoder(*inputs)))

    decoders = variants(build_decoder(cfg).eval(), args)
    if args.compiled:
        decoders["ours"].compile_stages()
    return {name: work(decoder) for name, decoder in decoders.items()}


def train_step(cfg: DictConfig, args: argparse.Namespace) -> dict[str, Work]:
    queries, targets = initial_queries(cfg, args), random_targets(cfg, args)
    maps = [features.requires_grad_() for features in random_maps(cfg, args)]
    criterion = instantiate(cfg.model.criterion)
    decoders = variants(build_decoder(cfg), args)
    weights = list(decoders["ours"].parameters())
    if args.compiled:
        decoders["ours"].compile_stages()

    def work(decoder: nn.Module) -> Work:
        def run():
            sum(criterion(decoder(*queries, maps), targets).values()).backward()

        return Work(run, maps, weights)

    return {name: work(decoder) for name, decoder in decoders.items()}


def sample(cfg: DictConfig, args: argparse.Namespace) -> dict[str, Work]:
    decoder = build_decoder(cfg)
    content, _ = initial_queries(cfg, args)
    boxes = random_boxes(content.shape[:2], args.size).to(content.device)
    with torch.no_grad():
        points = decoder.stages[-1].points(content, corners_to_xyzr(boxes)).requires_grad_()
    leaves = [points, *(features.requires_grad_() for features in random_maps(cfg, args))]
    shape = *points.shape[:-1], cfg.model.decoder.feature_dim // points.shape[2]
    gradient = torch.randn(shape, device=points.device)

    def work(decoder: nn.Module) -> Work:
        def run():
            pyramid = decoder.make_pyramid(leaves[1:], decoder.strides, decoder.num_groups)
            pyramid.sample(points).backward(gradient)

        return Work(run, leaves)

    return {name: work(variant) for name, variant in variants(decoder, args).items()}


def assign(cfg: DictConfig, args: argparse.Namespace) -> dict[str, Work]:
    options, criterion = cfg.model.decoder, instantiate(cfg.model.criterion)
    shape = len(options.points_per_stage), args.batch, cfg.model.query_generator.num_queries
    logits = torch.randn(*shape, options.num_classes, device=cfg.train.device) - 4
    boxes, targets = random_boxes(shape, args.size).to(logits.device), random_targets(cfg, args)

    def run():
        criterion.assign(logits, boxes, targets)

    return {"ours": Work(run)}


def twin(model: nn.Module) -> nn.Module:
    """A model of the same weights in the same memory, which can be changed by itself."""
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, weights)


def eager(model: nn.Module) -> nn.Module:
    return model


def compiled(model: nn.Module) -> nn.Module:
    model = twin(model)
    model.backbone.compile()
    model.decoder.compile_stages()
    return model


@functools.lru_cache(maxsize=1)
def traced(model: nn.Module) -> ExportedProgram:
    return trace(DetectionGraph(twin(model)))


def program(model: nn.Module) -> ExportedModel:
    run = traced(model).module()
    return ExportedModel(
        lambda *inputs: run(*(value.to(model.device) for value in inputs)), model.size_divisibility
    )


def onnx(model: nn.Module) -> ExportedModel:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(onnx_bytes(traced(model), {}))
        return ExportedModel(load_onnx(str(path))[0], model.size_divisibility)


DEPLOYED = {"eager": eager, "compiled": compiled, "program": program, "ONNX": onnx}


@torch.no_grad()
def measure_deployed(args: argparse.Namespace) -> dict:
    """``deploy``. What is not available here has its reason in place of figures.

    Raises:
        UserError: the config or the checkpoint cannot be used, or there is no such device.
    """
    config_file = args.config_file or ("" if args.checkpoint else CONFIG)
    keep_freed_memory()
    model, cfg, _ = open_model(args.checkpoint, config_file, args.overrides)
    require_part(cfg, "model.decoder", config_file or args.checkpoint)
    device = cfg.train.device
    if not args.checkpoint:
        wake(model)
    images = [
        {"image": torch.randint(256, (3, *args.size), dtype=torch.uint8)} for _ in range(args.batch)
    ]
    works, missing = {}, {}
    for name, make in DEPLOYED.items():
        try:
            run = functools.partial(make(model), images)
            run()  # compiles
        except (UserError, torch._dynamo.exc.TorchDynamoException) as error:  # no compiler
            missing[name] = {"missing": str(error).splitlines()[0]}
        else:
            works[name] = Work(run, uses_torch=name != "ONNX")
    rows, yardstick_ms = measure_rows(works, args.runs, device)
    for row in rows.values():
        row["speed"] = rows["eager"]["median_ms"] / row["median_ms"]
    rows.update(missing)
    return {"rows": rows, "yardstick_ms": yardstick_ms, "device": device_name(device)}


def evaluate(evaluation: type, truth: COCO, detections: list[dict]) -> dict[str, np.ndarray]:
    """Precision and recall as Detectron2 has them computed, here by the class ``evaluation``."""
    done = evaluation(truth, truth.loadRes(detections), "bbox")
    done.evaluate()
    done.accumulate()
    done.summarize()
    # All else goes: the garbage collector would look through millions of objects in the next run.
    return {name: done.eval[name] for name in ("precision", "recall")}


def measure_evaluation(args: argparse.Namespace) -> dict:
    """``eval``. With ``--compare``, also the largest difference of any precision or recall."""
    rng, truth = np.random.default_rng(0), COCO()
    truth.dataset = random_truth(args.images, rng)
    detections, done = random_detections(truth.dataset, rng), {}

    def work(name: str, evaluation: type) -> Work:
        def run():
            done[name] = evaluate(evaluation, truth, detections)

        return Work(run, uses_torch=False)

    works = {"ours": work("ours", evaluator.coco_evaluation.COCOeval_opt)}
    if args.compare:
        works["plain"] = work("plain", COCOeval)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress
        truth.createIndex()
        result = measure(works, args.runs, "cpu")
    if args.compare:
        result["largest_difference"] = max(
            float(np.abs(done["ours"][name] - done["plain"][name]).max())
            for name in done["ours"]
        )
    return result


def time_loader(loader: Iterable[list], batches: int, runs: int) -> list[float]:
    """Milliseconds of ``batches`` batches. Worker processes end with the function."""
    endless = iter(loader)
    work = Work(lambda: list(itertools.islice(endless, batches)))
    return measure_times({"loader": work}, runs, time.perf_counter)["loader"]


def measure_data(args: argparse.Namespace) -> dict:
    """``data``: times are those of one image."""
    options = load(args, "dataloader.train").dataloader.train
    batches = max(1, options.num_workers)  # come at nearly the same time, and are one run
    yardstick, wall = {"yardstick": matrix_product("cpu")}, time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        json_file = make_photographs(folder, args.images)
        options.dataset = L(coco_dataset)(json_file=json_file, image_root=folder, training=True)
        records, mapper = instantiate(options.dataset), instantiate(options.mapper)
        read = Work(lambda: [read_image(r["file_name"], mapper.image_format) for r in records])
        parts = {"decode": read, "map": Work(lambda: [mapper(record) for record in records])}
        parts = measure_times(parts, args.runs, time.process_time)
        # Not in turn with the loader, whose processes would go on in the meantime.
        before = measure_times(yardstick, args.runs, wall)["yardstick"]
        times = time_loader(instantiate({**options, "dataset": records}), batches, args.runs)
        yardsticks = before + measure_times(yardstick, args.runs, wall)["yardstick"]
    images = batches * options.total_batch_size
    result = summarize_times([time / images for time in times], yardsticks)
    decode, whole = (float(np.median(parts[name])) / len(records) for name in ("decode", "map"))
    return {
        **result,
        "yardstick_ms": float(np.median(yardsticks)),
        "peak_memory_bytes": None,
        "num_workers": options.num_workers,
        "images_per_second": 1000 / result["median_ms"],
        "decode_ms": decode,
        "map_ms": whole - decode,
    }


def load(args: argparse.Namespace, part: str) -> DictConfig:
    """The config, whose ``part`` is what is measured. Raises UserError if it cannot be used."""
    config_file = args.config_file or CONFIG
    cfg = load_config(config_file, args.overrides)
    require_part(cfg, part, config_file)
    return cfg


def require_part(cfg: DictConfig, part: str, name: str):
    """Raises UserError if the config of a file has no such part to measure."""
    if OmegaConf.select(cfg, part) is None:
        raise UserError(f"{name} has no {part} to measure: give another config")


def measure_decoder(args: argparse.Namespace) -> dict:
    """What runs on the device of the config.

    Raises:
        UserError: the config cannot be used, or there is no such device or no compiler.
    """
    cfg = load(args, "model.decoder")
    cfg.train.device = device = select_device(cfg.train.device)
    keep_freed_memory()
    with explain_misfits("model"):
        works = WORKS[args.command](cfg, args)
    try:
        result = measure(works, args.runs, device)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise UserError(f"--compiled does not work here: {str(error).splitlines()[0]}") from error
    return {**result, "device": device_name(device)}


WORKS = {"forward": forward, "train-step": train_step, "sample": sample, "assign": assign}
SIZE = 800, 1216
OPTIONS = {  # of each command, with defaults; None for switches
    "forward": {"batch": 1, "size": SIZE, "compiled": None, "compare": None},
    "train-step": {"batch": 1, "size": SIZE, "objects": 20, "compiled": None, "compare": None},
    "sample": {"batch": 1, "size": SIZE, "compare": None},
    "assign": {"batch": 2, "size": SIZE, "objects": 20},
    "deploy": {"checkpoint": "", "batch": 1, "size": SIZE},
    "data": {"images": 32},
    "eval": {"images": 5000, "compare": None},
}


def benchmark(args: argparse.Namespace) -> dict:
    """Measure what the arguments say.

    Raises:
        UserError: an argument or the config cannot be used.
    """
    for name in ("threads", "runs", "batch", "size", "objects", "images"):
        given = getattr(args, name, None)
        if given is not None and np.min(given) < 1:
            raise UserError(f"--{name} must be 1 or more")
    try:
        Path(args.json or os.devnull).touch()
    except OSError as error:
        raise UserError(f"cannot write --json {args.json}: {error.strerror}") from error
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()
    kinds = {"deploy": measure_deployed, "data": measure_data, "eval": measure_evaluation}
    return {
        "command": args.command,
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "runs": args.runs,
        **kinds.get(args.command, measure_decoder)(args),
        # Whether code of torch.compile ran, which does without where it is switched off.
        "compiled": torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0,
    }


def report(result: dict):
    """Print the result."""
    lines, speed = [], ["speed"] * ("rows" in result)
    rows = result.get("rows") or {"ours": result, "plain": result.get("plain", {})}
    for name, row in rows.items():
        if "missing" in row:
            lines.append([name, None, row["missing"], None, None, None])
        elif row:
            spread = "{:.2f} to {:.2f}".format(*row["spread_ms"])
            memory = row["peak_memory_bytes"] and row["peak_memory_bytes"] / 1e6
            figures = row["median_ms"], spread, row["ratio_to_sgemm2048"], memory
            lines.append([name, *figures, *map(row.get, speed)])
    print(
        "{command} on {device}, torch {torch}, threads: {threads}, runs: {runs}, compiled: "
        "{compiled}\nyardstick: {yardstick_ms:.1f} ms\n".format(**result)
    )
    header = ["", "median, ms", "quartiles", "ratio to yardstick", "peak memory, MB", *speed]
    print(tabulate(lines, header, floatfmt=".2f", missingval="-"))
    others = ("quotient", "largest_difference", "images_per_second", "decode_ms", "map_ms")
    for name in filter(result.__contains__, others):
        print(f"{name.replace('_', ' ')}: {result[name]:.4g}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, options in OPTIONS.items():
        added = commands.add_parser(command)
        added.add_argument("--threads", type=int, metavar="N", help="default: torch's")
        added.add_argument("--runs", type=int, default=7, metavar="R", help="default: 7")
        added.add_argument("--json", metavar="FILE", help="where the figures go as well")
        for name, default in options.items():
            kind = {"action": "store_true"} if default is None else {"type": int, "default": default}
            if name == "size":
                kind.update(nargs=2, metavar=("H", "W"))
            if name == "checkpoint":
                kind.update(type=str, metavar="FILE")
            added.add_argument(f"--{name}", **kind)
        if command != "eval":
            added.add_argument("--config-file", metavar="FILE")
            added.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


@_start.command
def main(argv=None):
    args = build_parser().parse_args(argv)
    result = benchmark(args)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    report(result)


if __name__ == "__main__":
    main()
