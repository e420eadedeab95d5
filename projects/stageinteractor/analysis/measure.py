"""How long a piece of work takes and how much memory, beside a yardstick of the machine's speed.

At the end, random input for it.
"""

import itertools
import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..data.coco_file import Box, LabelledImage, to_coco

YARDSTICK_SIZE = 2048  # rows and columns of the matrices
WARM_UPS = 2
PHOTOGRAPH = 480, 640  # height and width of random photographs
NUM_CLASSES = 80  # of their objects
DETECTIONS = 100  # an image


class Work(NamedTuple):
    """What is measured."""

    run: Callable[[], object]
    leaves: Sequence[Tensor] = ()  # what gets gradients, each run anew
    weights: Sequence[Tensor] = ()  # the same, but these gradients are not counted as memory
    uses_torch: bool = True  # else its memory is not known

    def reset(self):
        """Forget the gradients of an earlier run."""
        for tensor in (*self.leaves, *self.weights):
            tensor.grad = None


def select_clock(device: str) -> Callable[[], float]:
    """A clock in seconds: of a CPU the time it works for this process, in all threads together.

    Of other devices it is the time that passes until they have nothing left to do.
    """
    if device == "cpu":
        return time.process_time

    def synchronized() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return synchronized


def matrix_product(device: str) -> Work:
    """The yardstick: a float32 product of two square matrices into memory that is there."""
    shape = YARDSTICK_SIZE, YARDSTICK_SIZE
    first, second = torch.randn(shape, device=device), torch.randn(shape, device=device)
    out = torch.empty_like(first)
    return Work(lambda: torch.mm(first, second, out=out))


def measure_times(
    works: dict[str, Work], runs: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Milliseconds of every run of every work. They take turns, so that all see the same machine.

    Warm-ups come before and are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(WARM_UPS + runs):
        for name, work in works.items():
            work.reset()
            start = clock()
            work.run()
            if turn >= WARM_UPS:
                times[name].append(1000 * (clock() - start))
    return times


def summarize_times(times: Sequence[float], yardstick: Sequence[float]) -> dict:
    """Median and quartiles of milliseconds, and the ratio of the medians of both."""
    median = float(np.median(times))
    return {
        "median_ms": median,
        "spread_ms": np.percentile(times, [25, 75]).tolist(),
        "ratio_to_sgemm2048": median / float(np.median(yardstick)),
    }


def peak_memory(work: Work, device: str) -> int | None:
    """Bytes that torch holds at most during a run, above what it holds before; None if unknown.

    Memory for the gradients of ``weights`` is there before, so that it does not count.
    """
    is_cuda = torch.device(device).type == "cuda"
    if not work.uses_torch or not (is_cuda or device == "cpu"):
        return None
    work.reset()
    for weight in work.weights:
        weight.grad = torch.zeros_like(weight)
    if is_cuda:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work.run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work.run()
    # The profiler's own tables sum these up operator by operator.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def measure_rows(
    works: dict[str, Work], runs: int, device: str
) -> tuple[dict[str, dict], float]:
    """Time and memory of every work, and the milliseconds of the yardstick beside them."""
    yardstick = {"yardstick": matrix_product(device)}
    times = measure_times({**yardstick, **works}, runs, select_clock(device))
    rows = {
        name: {
            **summarize_times(times[name], times["yardstick"]),
            "peak_memory_bytes": peak_memory(work, device),
        }
        for name, work in works.items()
    }
    return rows, float(np.median(times["yardstick"]))


def measure(works: dict[str, Work], runs: int, device: str) -> dict:
    """Time and memory of the work "ours", those of "plain", if there is one, below its name."""
    rows, yardstick_ms = measure_rows(works, runs, device)
    result = {**rows["ours"], "yardstick_ms": yardstick_ms}
    if "plain" in rows:
        result["plain"] = rows["plain"]
        result["quotient"] = rows["plain"]["median_ms"] / rows["ours"]["median_ms"]
    return result


def device_name(device: str) -> str:
    """What the maker calls the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # Linux, where Python has no name
    found = cpuinfo.exists() and re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.M)
    return found[1] if found else platform.processor() or device


def random_boxes(shape: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """Corners (*shape, 4) in an image of ``size``."""
    extent = torch.tensor(size[::-1])
    sides = extent * (0.02 + 0.4 * torch.rand(*shape, 2))
    low = torch.rand(*shape, 2) * (extent - sides)
    return torch.cat([low, low + sides], dim=-1)


def random_truth(count: int, rng: np.random.Generator) -> dict:
    """A data set in COCO's format with about 7 objects an image."""
    height, width = PHOTOGRAPH
    images = []
    for index in range(1, count + 1):
        boxes = []
        for _ in range(1 + rng.poisson(6)):
            sides = 2 ** rng.uniform(3, 8.5, 2)
            low = rng.uniform(0, (width, height) - sides)
            category = int(rng.integers(NUM_CLASSES))
            boxes.append(Box(category, [*low, *(low + sides)], int(rng.random() < 0.01)))
        images.append(LabelledImage(Path(f"{index}.jpg"), width, height, boxes))
    return to_coco([f"class {c}" for c in range(1, NUM_CLASSES + 1)], images, Path())


def random_detections(truth: dict, rng: np.random.Generator) -> list[dict]:
    """Detections in COCO's result format: true boxes moved a little, one in five of any class."""
    boxes: dict[int, list] = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        boxes[annotation["image_id"]].append((annotation["bbox"], annotation["category_id"]))
    detections = []
    for image, objects in boxes.items():
        for index in range(DETECTIONS):
            box, category = objects[index % len(objects)]
            moved = np.array(box) + np.array(box[2:] * 2) * rng.normal(0, 0.15, 4)
            if rng.random() < 0.2:
                category = int(rng.integers(1, NUM_CLASSES + 1))
            detections.append({
                "image_id": image,
                "category_id": category,
                "bbox": [*moved[:2].tolist(), *moved[2:].clip(1).tolist()],
                "score": rng.random(),
            })
    return detections


def make_photographs(folder: str, count: int) -> str:
    """Write smooth random JPEGs with a little noise, and return the path of their COCO file."""
    rng = np.random.default_rng(0)
    truth, (height, width) = random_truth(count, rng), PHOTOGRAPH
    for image in truth["images"]:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(Path(folder, image["file_name"]), quality=90)
    path = Path(folder, "truth.json")
    path.write_text(json.dumps(truth))
    return str(path)
