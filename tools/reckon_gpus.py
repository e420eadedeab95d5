#!/usr/bin/env python
"""Reckon how the throughput of training grows from 1 to 64 GPUs, and what limits it.

    python tools/reckon_gpus.py [--config-file FILE] [--batch B] [--step-seconds S] [--image-ms T]
        [--gpus-per-node G] [--node-gb-per-s X] [--network-gb-per-s Y] [key=value ...]

The gradients are those of the config's model. Not given, the time of a step with B images of
800 x 1216 pixels a GPU is measured on the device of the config, and that of reading and
augmenting an image on a processor core. What is reckoned, and how: docs/many_gpus.md.
"""

import argparse
from typing import List, NamedTuple, Sequence

import _start
import benchmark
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from omegaconf import DictConfig
from tabulate import tabulate

from projects.stageinteractor.config.device import keep_freed_memory, select_device
from projects.stageinteractor.analysis.measure import (
    Work,
    gradient_bytes,
    measure_times,
    random_boxes,
    select_clock,
)
from projects.stageinteractor.errors import UserError

GPUS = 1, 2, 4, 8, 16, 32, 64
BACKWARD = 2 / 3  # of a step, during which gradients travel while others are computed
LAST_BUCKET = 25 * 2**20  # bytes that DistributedDataParallel sends when nothing is left to compute
OBJECTS = 7  # an image, as in COCO


class Cluster(NamedTuple):
    """Bytes a second that a GPU exchanges with those of its node, and a node with others."""

    gpus_per_node: int
    node_bandwidth: float
    network_bandwidth: float

    def exchange_seconds(self, gpus: int, size: float) -> float:
        """Time to sum ``size`` bytes over all GPUs: by a ring in each node, and one of the nodes.

        A ring of n sends every byte 2 (n - 1) / n times.
        """
        members, nodes = min(gpus, self.gpus_per_node), -(-gpus // self.gpus_per_node)
        inside = 2 * (members - 1) / members * size / self.node_bandwidth
        return inside + 2 * (nodes - 1) / nodes * size / self.network_bandwidth


class Throughput(NamedTuple):
    gpus: int
    exchange: float  # seconds to sum the gradients
    waiting: float  # of these, seconds in which nothing is computed
    images_per_second: float
    efficiency: float  # of so many GPUs alone
    limit: str


def reckon(
    gpus: int, batch: int, step: float, size: float, image: float, workers: int, cluster: Cluster
) -> Throughput:
    """Throughput of training.

    Args:
        gpus: how many.
        batch: images of a GPU in a step.
        step: seconds that a step takes on a GPU alone.
        size: bytes of gradients.
        image: seconds in which a loader's worker gives an image.
        workers: of the loader, for each GPU, each with a core of its own.
        cluster: how fast gradients travel.
    """
    exchange = cluster.exchange_seconds(gpus, size)
    hidden = min(exchange * max(0.0, 1 - LAST_BUCKET / size), BACKWARD * step)
    waiting = exchange - hidden
    computed, loaded = batch / (step + waiting), max(workers, 1) / image
    alone = min(batch / step, loaded)
    if loaded < computed:
        limit = "loader"
    elif waiting > 0.1 * step:
        limit = "communication"
    else:
        limit = "computing"
    rate = min(computed, loaded)
    return Throughput(gpus, exchange, waiting, gpus * rate, rate / alone, limit)


def measure_step(cfg: DictConfig, batch: int) -> float:
    """Seconds of forward pass, losses and backward pass of the whole model on random images."""
    device = select_device(cfg.train.device)
    keep_freed_memory()
    model = instantiate(cfg.model).to(device).train()
    height, width = benchmark.SIZE
    images = []
    for _ in range(batch):
        objects = Instances((height, width))
        objects.gt_boxes = Boxes(random_boxes((OBJECTS,), (height, width)))
        objects.gt_classes = torch.zeros(OBJECTS, dtype=torch.long)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        images.append({"image": image, "instances": objects, "height": height, "width": width})
    amp = cfg.train.amp

    def run():
        with torch.autocast(device.split(":")[0], getattr(torch, amp.dtype), amp.enabled):
            losses = model(images)
        sum(losses.values()).backward()

    work = Work(run, weights=list(model.parameters()))
    return min(measure_times({"step": work}, 3, select_clock(device))["step"]) / 1000


def report(rows: Sequence[Throughput]):
    """Print the table."""
    header = ["GPUs", "exchange, ms", "of that waiting, ms", "images/s", "efficiency", "limit"]
    table: List[list] = [
        [row.gpus, 1000 * row.exchange, 1000 * row.waiting, row.images_per_second,
         f"{row.efficiency:.0%}", row.limit]
        for row in rows
    ]
    print(tabulate(table, header, floatfmt=("d", ".1f", ".1f", ".1f")))


@_start.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=benchmark.CONFIG, metavar="FILE")
    parser.add_argument("--batch", type=int, default=2, help="images of a GPU; default: 2")
    parser.add_argument("--step-seconds", type=float, help="of a GPU alone; default: measured")
    parser.add_argument("--image-ms", type=float, help="of a worker of the loader; likewise")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: 8")
    parser.add_argument("--node-gb-per-s", type=float, default=200, help="default: 200")
    parser.add_argument("--network-gb-per-s", type=float, default=12.5, help="default: 12.5")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be more than 0")
    cfg = benchmark.load(args, "model")
    size = gradient_bytes(instantiate(cfg.model))
    step, image = args.step_seconds, args.image_ms
    if step is None:
        step = measure_step(cfg, args.batch)
    if image is None:
        torch.set_num_threads(1)  # as in a worker
        given = ["data", "--config-file", args.config_file, *args.overrides]
        found = benchmark.measure_data(benchmark.build_parser().parse_args(given))
        image = found["decode_ms"] + found["map_ms"]
    cluster = Cluster(args.gpus_per_node, 1e9 * args.node_gb_per_s, 1e9 * args.network_gb_per_s)
    workers = cfg.dataloader.train.num_workers
    print(
        f"gradients {size / 1e6:.0f} MB, a step of {args.batch} images {step:.3f} s, an image "
        f"{image:.1f} ms in each of {workers} workers of a GPU\n"
        f"{cluster.gpus_per_node} GPUs a node at {args.node_gb_per_s:g} GB/s, between nodes "
        f"{args.network_gb_per_s:g} GB/s\n"
    )
    report([
        reckon(gpus, args.batch, step, size, image / 1000, workers, cluster) for gpus in GPUS
    ])


if __name__ == "__main__":
    main()
