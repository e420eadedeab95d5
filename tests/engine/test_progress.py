"""The line of a training log, and the gradient norm, speed and memory that it shows."""

import logging
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from hydra.core.override_parser.overrides_parser import OverridesParser

from projects.stageinteractor.engine import progress, trainer
from projects.stageinteractor.engine.setup import set_up_logging
from projects.stageinteractor.engine.trainer import Trainer
from support.regression import Regression


@pytest.fixture
def said(monkeypatch):
    """What is logged."""
    messages = []
    monkeypatch.setattr(progress.LOGGER, "info", messages.append)
    return messages


def record(iterations, **scalars):
    """Put lists of scalars into the current storage, one of each an iteration."""
    storage = progress.get_event_storage()
    for index, iteration in enumerate(iterations):
        storage.iter = iteration
        for name, values in scalars.items():
            name = name.replace("labels_", "labels/")
            if values[index] is not None:
                hint = name not in ("lr", "grad_norm")
                storage.put_scalar(name, values[index], smoothing_hint=hint)


def test_the_line_of_stages(said, monkeypatch):
    """Medians, counted by hand; the mean for waiting; the rest at 2 s an iteration."""
    monkeypatch.setattr(progress, "peak_memory", lambda: 811.6)
    with EventStorage(337) as storage:
        record(
            range(337, 340),
            total_loss=[9.0, 12.314, 20.0],
            stage0_loss_cls=[1.0, 1.5, 9.0],
            stage0_loss_bbox=[0.25, 0.6, 0.75],
            stage2_loss_cls=[3.0, 2.0, 1.0],
            stage10_loss_giou=[123.4, 123.4, 123.4],
            labels_kept=[0.5, 0.61, 0.7], labels_dropped=[0.5, 0.39, 0.3],
            labels_gained=[0.2, 0.24, 1.25],
            grad_norm=[8.26, 1000.0, 7.0], lr=[1e-3, 1e-3, 2.5e-4],
            images_per_second=[1.0, 9.84, 30.0],
            time=[None, 1.0, 3.0], data_time=[50.0, 0.02, 0.06],
        )
        progress.ProgressPrinter(1600, eval_period=400).write()
        assert storage.latest()["memory"] == (811.6, 339)
        assert storage.latest()["eta_seconds"] == (2 * 1260, 339)
    assert said == [
        "eta: 0:42:00 + 4 evaluations  iter: 340/1600  loss: 12.31 (stages 2.1 2 123)  "
        "labels: kept 61% dropped 39% gained 24%  grad: 7  lr: 2.50e-04  speed: 9.84 img/s  "
        "data: 2%  mem: 812 MiB"
    ]


def test_the_line_of_other_models(said, monkeypatch):
    """Detectron2's losses by their names; nothing about what nobody records."""
    monkeypatch.setattr(progress, "peak_memory", lambda: 5)
    with EventStorage():
        record([0], total_loss=[0.75], loss_cls=[0.5], loss_box_reg=[0.25])
        progress.ProgressPrinter(10).write()
    with EventStorage():
        record([0], total_loss=[0.75])
        progress.ProgressPrinter(10).write()
    assert said == ["iter: 1/10  loss: 0.75 (loss_cls 0.5, loss_box_reg 0.25)  mem: 5 MiB",
                    "iter: 1/10  loss: 0.75  mem: 5 MiB"]


def test_medians_are_of_the_last_20_iterations(said):
    with EventStorage():
        record(range(60), total_loss=[100.0] * 40 + [1.0] * 20)
        progress.ProgressPrinter(100).write()
    assert "iter: 60/100  loss: 1  " in said[0]


def test_one_slow_iteration_of_five_is_seen(said):
    """As the share of all time, which begins with the third iteration; the median would be 0%."""
    with EventStorage():
        data_time, times = [9.0, 0.0, 0.0, 0.0, 1.5], [None, None, 1.0, 1.0, 3.0]
        record(range(5), total_loss=[1.0] * 5, data_time=data_time, time=times)
        progress.ProgressPrinter(100).write()
    assert "data: 30%" in said[0]


def test_the_rest_of_a_run_counts_slow_iterations_and_evaluations(said):
    """One of four waits 4 s for data, which a median hides; an evaluation takes 100 s."""
    with EventStorage() as storage:
        printer = progress.ProgressPrinter(1010, eval_period=20)
        times = [1.0, 1.0, 1.0, 5.0] * 5
        record(range(20), total_loss=[1.0] * 20, time=times, data_time=[0.0] * 20)
        storage.put_scalar("eval_seconds", 100.0, smoothing_hint=False)
        printer.write()
        # 2 s an iteration; evaluations after 40, 60, ..., 1000, and after the last one
        assert storage.latest()["eta_seconds"][0] == 990 * 2 + 50 * 100
        record([1009], total_loss=[1.0], time=[1.0])
        printer.write()
    assert "eta: 1:56:20  iter" in said[0] and "eta: 0:00:00  iter: 1010/1010" in said[1]


def test_the_console_has_what_people_read_and_the_file_all_of_it(tmp_path, capsys):
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    try:
        set_up_logging(str(tmp_path))
        for name in ("detectron2", "detectron2.data.build", "detectron2.checkpoint.c2"):
            logging.getLogger(name).info("detail")
            logging.getLogger(name).warning(f"trouble of {name}")
        for name in ("detectron2.train", "fvcore.common.checkpoint", "detectron2.engine.hooks"):
            logging.getLogger(name).info(f"news of {name}")
            logging.getLogger(name).debug("detail")
    finally:
        for logger, handlers, level in before:
            logger.handlers[:], logger.level = handlers, level
            logger.propagate = True
        setup_logger.cache_clear()
    shown, kept = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    assert shown.count("trouble of") == shown.count("news of") == 3 and "detail" not in shown
    assert kept.count("detail") == 6 and kept.count("trouble of") == kept.count("news of") == 3


def test_an_iteration_is_printed_once(said):
    """Detectron2 writes once more at the end, and when a run fails, even before the first loss."""
    printer = progress.ProgressPrinter(3)
    with EventStorage() as storage:
        printer.write()
        record([2], total_loss=[1.0])
        printer.write()
        record([3], **{"bbox/AP": [5.0]})
        printer.write()
        assert len(said) == 1 and storage.latest()["memory"][1] == 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's figure is Linux's")
def test_memory_is_what_the_kernel_says():
    ballast = np.ones(2**23)  # 64 MiB
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    assert progress.peak_memory() == pytest.approx(peak, abs=max(16, 0.02 * peak))
    assert progress.peak_memory() > ballast.nbytes / 2**20


def test_memory_on_other_systems(monkeypatch):
    usage = SimpleNamespace(ru_maxrss=3 * 2**20)
    resource = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    monkeypatch.setattr(progress, "resource", resource)
    for platform, mebibytes in (("linux", 3 * 1024), ("darwin", 3)):
        monkeypatch.setattr(sys, "platform", platform)
        assert progress.peak_memory() == mebibytes
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**20)
    assert progress.peak_memory() == 5


@pytest.mark.parametrize("clip", [None, {"max_norm": 0.01, "norm_type": 2}])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_grad_norm_is_that_before_clipping(clip, dtype):
    """Against a loop in float64 over the gradients of the same loss."""
    batches = [[[1.0, 2.0, 3.0, 40.0]] * 2, [[0.0, -1.0, 1.0, 7.0]] * 2]
    model = Regression()
    (sum(model(batch)["loss"] for batch in batches) / 2).backward()
    squares = 0.0
    for parameter in model.layers.parameters():
        for value in parameter.grad.double().flatten().tolist():
            squares += value * value
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    one = Trainer(model, batches, optimizer, amp_dtype=dtype, accumulation_steps=2, clip_grad=clip)
    # so that the scaled gradient does not overflow
    one.grad_scaler.load_state_dict({**one.grad_scaler.state_dict(), "scale": 4.0})
    one.train(0, 1)
    recorded = one.storage.latest()["grad_norm"][0]
    assert recorded == pytest.approx(math.sqrt(squares), rel=1e-6 if dtype is None else 1e-2)


def test_images_per_second_count_all_batches_and_processes(monkeypatch):
    """Two batches of 3 and 2 images in 2 * 1.5 s for data and 2 * 0.5 s for the model, 4 ranks."""
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(trainer, "time", clock)
    model = Regression()

    def batches():
        for size in (3, 2):
            clock.now += 1.5
            yield [[1.0] * 4] * size

    def on_forward(*_):
        clock.now += 0.5

    model.register_forward_hook(on_forward)
    one = Trainer(model, batches(), torch.optim.SGD(model.parameters(), 0.1), accumulation_steps=2)
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    monkeypatch.setattr(comm, "gather", lambda metrics: [metrics])
    monkeypatch.setattr(trainer.dist, "all_reduce", lambda counts: None)
    one.train(0, 1)
    assert one.storage.latest()["images_per_second"][0] == pytest.approx(4 * 5 / 4.0)
    assert one.storage.latest()["data_time"][0] == pytest.approx(3.0)


@pytest.mark.parametrize("checkpoint", ["model_best.pth", "model_final.pth"])
def test_a_finished_run_names_commands_for_what_is_there(said, tmp_path, checkpoint):
    folder = tmp_path / "ein Lauf"
    folder.mkdir()
    for name in ("config.yaml", "metrics.json", "model_final.pth", checkpoint):
        (folder / name).touch()
    progress.log_next_commands(str(folder))
    words = [word for line in said[0].splitlines()[1:] for word in shlex.split(line)]
    override = OverridesParser.create().parse_override(
        next(word for word in words if word.startswith("train.init_checkpoint="))
    )
    assert override.value() == str(folder / checkpoint)
    named = [word for word in words if word.startswith(str(folder))]
    assert [word for word in named if not Path(word).exists()] == [str(folder / "training.png")]
