"""Measure this project on a GPU, and print a report for docs/performance.md.

    python tests/measure_gpu.py [--parts PART ...] [--data FOLDER]

Parts: card, tests, kernel, steps, deploy, processes, resume, learning; all, if none is named.
--data holds bccd/, deeppcb/ and tinycoco/: COCO files with "train" and "val" in their names, and
images/ (of tinycoco, a few photographs of COCO: images/train2017/). What is missing is not run.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("tools", "tests", "")]

# ruff: noqa: E402
import _start  # noqa: F401  (silences warnings)
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.engine.training_parts import build_distributed_model, build_trainer
from support.models import build, make_image, wake

CONFIGS = "projects/stageinteractor/configs"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def run(*words):
    """Run a command, print it and the end of its output, and return whether it succeeded."""
    print(f"\n$ python {' '.join(words)}", flush=True)
    start = time.time()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    print("\n".join(done.stdout.splitlines()[-60:]))
    print(f"exit code {done.returncode} after {time.time() - start:.0f} s", flush=True)
    return done.returncode == 0


def measure_step(options, batch, runs=10):
    """Milliseconds, busy share, waits and peak memory of a training step from pixels."""
    cfg = load_config(f"{ROOT}/{CONFIGS}/stageinteractor_r50_12ep.py", options)
    images = [make_image(800, 1216, objects=20) for _ in range(batch)]
    for image in images:
        image["image"] = image["image"].pin_memory()
    trainer = build_trainer(cfg, build_distributed_model(cfg).train(), itertools.repeat(images))
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
    for queries, batch, amp, compiled in itertools.product(
        (100, 300), (2, 16), ("false", "true"), ("false", "true")
    ):
        options = [f"model.query_generator.num_queries={queries}", f"train.amp.enabled={amp}",
                   f"train.compile.enabled={compiled}", "train.device=cuda"]
        try:
            found = measure_step(options, batch)
        except Exception as error:  # of one row; the others are still wanted
            found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        print(f"batch {batch}, {' '.join(options[:3])}: {found}", flush=True)
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def gradients(first, last, wrap=lambda model: model):
    torch.manual_seed(0)
    model, images = wake(build()).train().cuda(), [make_image(96, 96, objects=3) for _ in "ab"]
    sum(wrap(model)(images[first:last]).values()).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def one_of_two(rank, folder):
    """A process that shares the GPU; NCCL would refuse that, so gloo connects them."""
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    found = gradients(rank, rank + 1, torch.nn.parallel.DistributedDataParallel)
    torch.save(found, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def processes():
    """The gradients of two processes with an image each, against one process with both."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
        double = torch.load(f"{folder}/0.pth", map_location="cuda")
    single = gradients(0, 2)
    difference = max((a - b).abs().max() for a, b in zip(single, double))
    largest = max(gradient.abs().max() for gradient in single)
    print(f"largest difference, relative to the largest gradient: {difference / largest:.1e}")


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
    parser.add_argument("--parts", nargs="+", metavar="PART")
    parser.add_argument("--data", type=Path, default=ROOT / "datasets", metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=ROOT / "output/gpu", metavar="FOLDER")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():  # it is for NVIDIA's
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
    for name in args.parts or parts:
        print(f"\n## {name}", flush=True)
        try:
            parts[name]()
        except Exception as error:  # the other parts are still wanted
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
