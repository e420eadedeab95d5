"""Runs of ``tools/train_net.py`` with a tiny model on drawn shapes, as a person starts them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "projects/stageinteractor/configs/stageinteractor_lite0_trees.py"


def overrides(annotations, output, **extra):
    """The small configuration made tiny, on the shapes, without pretrained weights."""
    options = {
        "train.output_dir": output,
        "train.init_checkpoint": "''",
        "train.max_iter": 6,
        "train.eval_period": 3,
        "train.checkpointer.period": 2,
        "train.log_period": 1,
        "train.device": "cpu",
        "model.decoder.num_classes": 3,
        "model.decoder.points_per_stage": "[8,8,8]",
        "model.decoder.embed_dim": 32,
        "model.decoder.feature_dim": 16,
        "model.query_generator.num_queries": 10,
        "dataloader.train.total_batch_size": 2,
        **{
            f"dataloader.{split}.dataset.{key}": value
            for split in ("train", "test")
            for key, value in (
                ("json_file", annotations),
                ("image_root", annotations.parent / "images"),
            )
        },
        **extra,
    }
    return [f"{key}={value}" for key, value in options.items() if value is not None]


def command(*arguments, launcher=(sys.executable,)):
    return [*launcher, "tools/train_net.py", "--config-file", CONFIG, *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run(*arguments, launcher=(sys.executable,), expect=0):
    done = subprocess.run(
        command(*arguments, launcher=launcher),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def start(*arguments, log, launcher=(sys.executable,), **variables):
    """The command as a process that goes on, in a process group of its own."""
    return subprocess.Popen(
        command(*arguments, launcher=launcher), cwd=ROOT, env={**environment(), **variables},
        stdout=open(log, "ab"), stderr=subprocess.STDOUT, start_new_session=True,
    )


def wait_for(condition, process, seconds=120):
    """Wait until a condition of a running process holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def ranks_of(launcher):
    """Process ids of the processes of a run that a launcher has started, by rank."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            line = status.with_name("cmdline").read_text()
        except OSError:  # it has just ended
            continue
        if parent == launcher.pid and ("train_net.py" in line or "spawn_main" in line):
            found.append(int(status.parent.name))
    return sorted(found)


@contextlib.contextmanager
def started(*arguments, **options):
    """The command as a process that goes on, see `start`; what is left of it is killed."""
    process = start(*arguments, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in [*ranks_of(process), process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.wait()


def last_checkpoint(folder):
    """The name of the last one, empty without one."""
    note = folder / "last_checkpoint"
    return note.read_text() if note.exists() else ""


class Killed(BaseException):
    """Ends a run as abruptly as can be within a process."""


def checkpoint_of(folder, name="model_final.pth"):
    """The content of a run's checkpoint, by default of that after the last iteration."""
    return torch.load(folder / name, weights_only=True)


def assert_same_weights(one, other):
    """Two runs have ended with the same weights, to the last bit."""
    one, other = (checkpoint_of(folder)["model"] for folder in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
