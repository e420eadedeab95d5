"""The parts of training, evaluation and deployment that tools/benchmark.py measures."""

import contextlib
import copy
import functools
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from omegaconf import DictConfig
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.export import ExportedProgram

from ..data import coco_dataset, read_image
from ..engine import evaluator
from ..errors import UserError
from ..inference.export.exported_model import ExportedModel, load_onnx
from ..inference.export.graph import DetectionGraph
from ..inference.export.writers import onnx_files, trace
from ..modeling.boxes import corners_to_xyzr
from ..modeling.sampling import FeatureMaps
from .random_input import (
    initial_queries,
    make_photographs,
    random_boxes,
    random_detections,
    random_maps,
    random_targets,
    random_truth,
)
from .timing import Work, matrix_product, measure_rows, measure_times, summarize_times

Size = tuple[int, int]  # height and width in pixels


def randomize_zero_weights(model: nn.Module) -> nn.Module:
    """Give a model random weights where training starts with zeros, and return it.

    Otherwise all queries would sample the same points and generate the same filters.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def build_decoder(cfg: DictConfig) -> nn.Module:
    """Build the decoder with random weights."""
    return randomize_zero_weights(instantiate(cfg.model.decoder)).to(cfg.train.device)


def variants(decoder: nn.Module, compare: bool, compiled: bool = False) -> dict[str, nn.Module]:
    """Return the decoder and, to compare, one with the same weights that samples the plain maps."""
    found = {"ours": decoder}
    if compare:
        found["plain"] = copy.copy(decoder)
        found["plain"].make_pyramid = FeatureMaps
    if compiled:
        decoder.compile_stages()
    return found


def forward(
    cfg: DictConfig, *, batch: int, size: Size, compiled: bool, compare: bool
) -> dict[str, Work]:
    """The decoder without gradients."""
    inputs = (*initial_queries(cfg, batch, size), random_maps(cfg, batch, size))

    def work(decoder: nn.Module) -> Work:
        return Work(torch.no_grad()(lambda: decoder(*inputs)))

    decoders = variants(build_decoder(cfg).eval(), compare, compiled)
    return {name: work(decoder) for name, decoder in decoders.items()}


def train_step(
    cfg: DictConfig, *, batch: int, size: Size, objects: int, compiled: bool, compare: bool
) -> dict[str, Work]:
    """The decoder, the losses, and all gradients."""
    queries, targets = initial_queries(cfg, batch, size), random_targets(cfg, batch, size, objects)
    maps = [features.requires_grad_() for features in random_maps(cfg, batch, size)]
    criterion, decoder = instantiate(cfg.model.criterion), build_decoder(cfg)
    weights = list(decoder.parameters())

    def work(decoder: nn.Module) -> Work:
        def run():
            sum(criterion(decoder(*queries, maps), targets).values()).backward()

        return Work(run, maps, weights)

    return {name: work(one) for name, one in variants(decoder, compare, compiled).items()}


def sample(cfg: DictConfig, *, batch: int, size: Size, compare: bool) -> dict[str, Work]:
    """Feature sampling of one stage, with its gradients."""
    decoder = build_decoder(cfg)
    content, _ = initial_queries(cfg, batch, size)
    boxes = random_boxes(content.shape[:2], size).to(content.device)
    with torch.no_grad():
        points = decoder.stages[-1].points(content, corners_to_xyzr(boxes)).requires_grad_()
    maps = [features.requires_grad_() for features in random_maps(cfg, batch, size)]
    shape = *points.shape[:-1], cfg.model.decoder.feature_dim // points.shape[2]
    gradient = torch.randn(shape, device=points.device)

    def work(decoder: nn.Module) -> Work:
        def run():
            pyramid = decoder.make_pyramid(maps, decoder.strides, decoder.num_groups)
            pyramid.sample(points).backward(gradient)

        return Work(run, [points, *maps])

    return {name: work(variant) for name, variant in variants(decoder, compare).items()}


def assign(cfg: DictConfig, *, batch: int, size: Size, objects: int) -> dict[str, Work]:
    """Matching and label assignment of all stages."""
    options, criterion = cfg.model.decoder, instantiate(cfg.model.criterion)
    num_stages = len(options.points_per_stage[:options.get("num_stages")])
    shape = num_stages, batch, cfg.model.query_generator.num_queries
    logits = torch.randn(*shape, options.num_classes, device=cfg.train.device) - 4
    boxes = random_boxes(shape, size).to(logits.device)
    targets = random_targets(cfg, batch, size, objects)
    return {"ours": Work(lambda: criterion.assign(logits, boxes, targets))}


WORKS = {"forward": forward, "train-step": train_step, "sample": sample, "assign": assign}


def measure_decoder(works: dict[str, Work], runs: int, device: str) -> dict:
    """Measure what one of `WORKS` has made.

    Raises:
        UserError: the config's numbers do not fit each other, or the compiler does not work here.
    """
    try:
        rows, yardstick_ms = measure_rows(works, runs, device)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise UserError(f"--compiled does not work here: {str(error).splitlines()[0]}") from error
    return {"rows": rows, "yardstick_ms": yardstick_ms}


def share_weights(model: nn.Module) -> nn.Module:
    """Return a copy with the same weights in the same memory, which can be changed separately."""
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, weights)


def compiled(model: nn.Module) -> nn.Module:
    model = share_weights(model)
    model.backbone.compile()
    model.decoder.compile_stages()
    return model


@functools.lru_cache(maxsize=1)
def traced(model: nn.Module) -> ExportedProgram:
    return trace(DetectionGraph(share_weights(model)))


def program(model: nn.Module) -> ExportedModel:
    run = traced(model).module()
    return ExportedModel(
        lambda *inputs: run(*(value.to(model.device) for value in inputs)), model.size_divisibility
    )


def onnx(model: nn.Module) -> ExportedModel:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(onnx_files(traced(model), {})[path.name])
        return ExportedModel(load_onnx(str(path))[0], model.size_divisibility)


DEPLOYED = {"eager": lambda model: model, "compiled": compiled, "program": program, "ONNX": onnx}


@torch.no_grad()
def measure_deployed(model: nn.Module, runs: int, *, batch: int, size: Size) -> dict:
    """Measure a detector in all the ways it can be used.

    What is not available here has a row with the reason, ``missing``, in place of figures.
    """
    images = [{"image": torch.randint(256, (3, *size), dtype=torch.uint8)} for _ in range(batch)]
    works, missing = {}, {}
    for name, make in DEPLOYED.items():
        try:
            run = functools.partial(make(model), images)
            run()  # compiles
        except (UserError, torch._dynamo.exc.TorchDynamoException) as error:  # no compiler
            missing[name] = {"missing": str(error).splitlines()[0]}
        else:
            works[name] = Work(run, uses_torch=name != "ONNX")
    rows, yardstick_ms = measure_rows(works, runs, str(model.device))
    return {"rows": {**rows, **missing}, "yardstick_ms": yardstick_ms}


def evaluate(
    evaluation: Callable, truth: COCO, detections: list[dict]
) -> dict[str, np.ndarray]:
    """Compute precision and recall as Detectron2 does, with an object that ``evaluation`` makes."""
    done = evaluation(truth, truth.loadRes(detections), "bbox")
    done.evaluate()
    done.accumulate()
    done.summarize()
    # The rest is dropped: its millions of objects would slow the garbage collector in later runs.
    return {name: done.eval[name] for name in ("precision", "recall")}


def measure_evaluation(runs: int, *, images: int, compare: bool) -> dict:
    """Measure COCO's metrics; to compare, also the largest difference of a precision or recall."""
    rng, truth, done = np.random.default_rng(0), COCO(), {}
    truth.dataset = random_truth(images, rng)
    detections = random_detections(truth.dataset, rng)

    def work(name: str, evaluation: Callable, truth: COCO) -> Work:
        results = [*map(dict, detections)]  # pycocotools adds keys to them

        def run():
            done[name] = evaluate(evaluation, truth, results)

        return Work(run, uses_torch=False)

    ours = evaluator.Truth(truth.dataset)
    works = {"ours": work("ours", evaluator.coco_evaluation.COCOeval_opt, ours)}
    if compare:
        works["plain"] = work("plain", COCOeval, truth)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth.createIndex()
        rows, yardstick_ms = measure_rows(works, runs, "cpu")
    result = {"rows": rows, "yardstick_ms": yardstick_ms}
    if compare:
        result["largest_difference"] = max(
            float(np.abs(values - done["plain"][name]).max())
            for name, values in done["ours"].items()
        )
    return result


def time_loader(loader: Iterable[list], batches: int, runs: int) -> list[float]:
    """Return the milliseconds of ``batches`` batches. Worker processes end with the function."""
    endless = iter(loader)
    work = Work(lambda: list(itertools.islice(endless, batches)))
    return measure_times({"loader": work}, runs, time.perf_counter)["loader"]


def measure_data(cfg: DictConfig, runs: int, *, images: int) -> dict:
    """Measure the training loader on random photographs; times are those of one image."""
    options, wall = cfg.dataloader.train, time.perf_counter
    batches = max(1, options.num_workers)  # they arrive almost together, and are one run
    yardstick = {"yardstick": matrix_product("cpu")}
    with tempfile.TemporaryDirectory() as folder:
        json_file = make_photographs(folder, images)
        options.dataset = L(coco_dataset)(json_file=json_file, image_root=folder, training=True)
        records, mapper = instantiate(options.dataset), instantiate(options.mapper)
        read = Work(lambda: [read_image(r["file_name"], mapper.image_format) for r in records])
        parts = {"decode": read, "map": Work(lambda: [mapper(record) for record in records])}
        parts = measure_times(parts, runs, time.process_time)
        # The loader's processes would go on working during the yardstick's turns.
        before = measure_times(yardstick, runs, wall)["yardstick"]
        times = time_loader(instantiate({**options, "dataset": records}), batches, runs)
        yardsticks = before + measure_times(yardstick, runs, wall)["yardstick"]
    per_run = batches * options.total_batch_size
    row = summarize_times([time / per_run for time in times], yardsticks)
    decode, whole = (float(np.median(parts[name])) / len(records) for name in ("decode", "map"))
    return {
        "rows": {"ours": row},
        "yardstick_ms": float(np.median(yardsticks)),
        "num_workers": options.num_workers,
        "images_per_second": 1000 / row["median_ms"],
        "decode_ms": decode,
        "map_ms": whole - decode,
    }
