"""Measure this project on a GPU, and print a report for docs/performance.md.

    python tests/measure_gpu.py [--parts PART ...] [--data FOLDER]

Parts: card, tests, kernel, steps, deploy, processes, resume, learning; all, if none is named.
--data holds bccd/, deeppcb/ and tinycoco/: COCO files with "train" and "val" in their names, and
images/ (of tinycoco, a few photographs of COCO: images/train2017/). What is missing is not run.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

import _start  # noqa: E402, F401  (prepares warnings)
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from projects.stageinteractor.analysis.random_input import random_boxes  # noqa: E402
from projects.stageinteractor.config.overrides import load_config  # noqa: E402
from projects.stageinteractor.engine.training_parts import (  # noqa: E402
    build_distributed_model,
    build_trainer,
)

CONFIGS = "projects/stageinteractor/configs"
PARTS = ("card", "tests", "kernel", "steps", "deploy", "processes", "resume", "learning")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def run(*words, env=None):
    """Run a command, print it and the end of its output, and return whether it succeeded."""
    print(f"\n$ {' '.join(words)}", flush=True)
    start, variables = time.time(), {**os.environ, **(env or {})}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=variables, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print("\n".join(done.stdout.splitlines()[-60:]))
    print(f"exit code {done.returncode} after {time.time() - start:.0f} s", flush=True)
    return done.returncode == 0


def random_batch(batch, size, objects, classes):
    from detectron2.structures import Boxes, Instances

    return [
        {"image": torch.randint(256, (3, *size), dtype=torch.uint8).pin_memory(),
         "instances": Instances(size, gt_boxes=Boxes(random_boxes((objects,), size)),
                                gt_classes=torch.randint(classes, (objects,)))}
        for _ in range(batch)
    ]


def measure_step(options, batch, device="cuda", size=(800, 1216), runs=10):
    """Milliseconds, busy share, waits and peak memory of a training step from pixels."""
    cfg = load_config(f"{ROOT}/{CONFIGS}/stageinteractor_r50_12ep.py",
                      [f"train.device={device}", *options])
    batches = itertools.repeat(random_batch(batch, size, 20, cfg.model.decoder.num_classes))
    trainer = build_trainer(cfg, build_distributed_model(cfg).train(), batches)
    trainer.train(0, 3)  # warms up and compiles
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    trainer.train(3, 3 + runs)
    torch.cuda.synchronize()
    elapsed = (time.perf_counter() - start) / runs
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        trainer.train(3 + runs, 6 + runs)
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    events = profiler.key_averages()
    busy = sum(event.self_device_time_total for event in events) / 1e6 / wall
    waits = sum(event.count for event in events if event.key in WAITS) / 3
    return (f"{1000 * elapsed:8.1f} ms  busy {busy:4.0%}  waits {waits:4.1f}  "
            f"memory {torch.cuda.max_memory_allocated() / 2**30:5.1f} GiB")


def steps():
    precisions = {"float32": [], "bfloat16": ["train.amp.enabled=true", "train.amp.dtype=bfloat16"]}
    for queries, batch, (name, amp), compiled in itertools.product(
        (100, 300), (2, 16), precisions.items(), (False, True)
    ):
        options = [f"model.query_generator.num_queries={queries}", *amp,
                   f"train.compile.enabled={str(compiled).lower()}"]
        try:
            found = measure_step(options, batch)
        except Exception as error:  # of one row; the others are still wanted
            found = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        form = "compiled" if compiled else "eager"
        print(f"{queries} queries, batch {batch:2}, {name:8}, {form:8}: {found}", flush=True)
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def average_of_two(rank, address, path):
    """One of two processes on one GPU; NCCL takes only one process each, so gloo connects them."""
    from support.models import build, make_image, wake

    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    images = [make_image(96, 96, objects=3), make_image(96, 96, objects=3)]
    model = wake(build()).train().cuda()
    both = torch.nn.parallel.DistributedDataParallel(model, device_ids=None)
    sum(both(images[rank:rank + 1]).values()).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    if rank == 0:
        torch.save(found, path)
    dist.destroy_process_group()


def processes():
    """The gradients of two processes with an image each, against one process with both."""
    from support.models import build, make_image, wake

    with tempfile.TemporaryDirectory() as folder:
        address, path = f"file://{folder}/meeting", f"{folder}/gradients.pth"
        torch.multiprocessing.spawn(average_of_two, (address, path), nprocs=2)
        double = torch.load(path, map_location="cuda")
    torch.manual_seed(0)
    images = [make_image(96, 96, objects=3), make_image(96, 96, objects=3)]
    model = wake(build()).train().cuda()
    sum(model(images).values()).backward()
    single = [p.grad for p in model.parameters() if p.grad is not None]
    largest = max(gradient.abs().max() for gradient in single)
    difference = max((a - b).abs().max() for a, b in zip(single, double)) / largest
    print(f"largest difference of a gradient, relative to the largest gradient: {difference:.1e}")


def dataset(folder, splits=("train", "val"), images="images"):
    """Overrides that name a data set: none if it is not there."""
    files = [next(iter(sorted(folder.rglob(f"*{split}*.json"))), None) for split in splits]
    if None in files:
        print(f"not run: {folder} has no data set")
        return []
    return [f"dataset.train={files[0]}", f"dataset.val={files[1]}",
            f"dataset.images={folder / images}"]


def train(config, options, output, *flags):
    return run("tools/train_net.py", "--config-file", f"{CONFIGS}/{config}.py", *flags, *options,
               f"train.output_dir={output}")


def last_ap(output):
    rows = map(json.loads, (Path(output) / "metrics.json").read_text().splitlines())
    return [row["bbox/AP"] for row in rows if "bbox/AP" in row][-1]


def resume(data, output):
    """A run that stops in the middle, against one that does not."""
    found = dataset(data / "tinycoco", ("train", "train"), "images/train2017")
    options = [*found, "train.max_iter=40", "train.checkpointer.period=20", "train.eval_period=0"]
    if not found or not train("stageinteractor_lite0_overfit", options, output / "whole"):
        return
    shutil.copytree(output / "whole", output / "half")
    (output / "half/model_final.pth").unlink()
    (output / "half/last_checkpoint").write_text("model_0000019.pth")
    train("stageinteractor_lite0_overfit", options, output / "half", "--resume")
    whole, half = (torch.load(output / name / "model_final.pth", map_location="cpu")["model"]
                   for name in ("whole", "half"))
    found = max((whole[name].float() - half[name].float()).abs().max() for name in whole)
    print(f"largest difference of a weight: {found:.1e}")


def learning(data, output):
    """BCCD and DeepPCB with the ResNet-50 and three seeds; tinycoco by heart."""
    for name, seed in itertools.product(("bccd", "deeppcb"), range(3)):
        options = dataset(data / name)
        if options and train("stageinteractor_r50_12ep", [
            *options, f"train.seed={seed}", "train.max_iter=4000", "train.eval_period=1000",
            "dataloader.train.total_batch_size=8", "optimizer.lr=1e-4", "train.amp.enabled=true",
        ], output / f"{name}{seed}"):
            print(f"{name}, seed {seed}: AP {last_ap(output / f'{name}{seed}'):.1f}")
    options = dataset(data / "tinycoco", ("train", "train"), "images/train2017")
    if options and train("stageinteractor_lite0_overfit", options, output / "by_heart"):
        print(f"tinycoco by heart: AP {last_ap(output / 'by_heart'):.1f} (goal 90)")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--data", type=Path, default=ROOT / "datasets", metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=ROOT / "output/gpu", metavar="FOLDER")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("error: torch finds no NVIDIA GPU here, so there is nothing to measure")
    benchmark, config = "tools/benchmark.py", f"{CONFIGS}/stageinteractor_r50_12ep.py"
    parts = {
        "card": lambda: run("tools/check.py", "model", "--device", "cuda"),
        "tests": lambda: run("-m", "pytest", "-q", "-m", "not rare"),
        "kernel": lambda: run(benchmark, "sample", "--compare", "--config-file", config),
        "steps": steps,
        "deploy": lambda: [run(benchmark, "deploy", "--batch", batch) for batch in ("1", "8")],
        "processes": processes,
        "resume": lambda: resume(args.data, args.output),
        "learning": lambda: learning(args.data, args.output),
    }
    for name in args.parts:
        print(f"\n## {name}", flush=True)
        try:
            parts[name]()
        except Exception as error:  # the other parts are still wanted
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    main()
