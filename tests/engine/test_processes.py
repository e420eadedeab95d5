"""Several processes on one machine learn what one learns; when one of them ends, so does the run.

What several machines add is in test_machines.py.
"""

import os
import re
import signal
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from projects.stageinteractor.engine.processes import torchrun_store
from support.runs import (
    assert_same_weights,
    checkpoint_of,
    last_checkpoint,
    metrics,
    overrides,
    ranks_of,
    run,
    started,
    wait_for,
)
from support.shapes import make_shapes

RUN = {
    "train.max_iter": 20,
    "train.eval_period": 0,
    "train.seed": 3,
    "train.checkpointer.max_to_keep": 100,
    "dataloader.train.num_workers": 1,  # a process that signals reach as well
}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
SECONDS = 60  # in which a run ends that has lost a process: on a busy machine, else in 5


@pytest.fixture(scope="module")
def whole(square_images, tmp_path_factory):
    """The run of two processes without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    run("--num-gpus", 2, *overrides(square_images, folder, **RUN))
    assert (folder / "log.txt.rank1").exists()
    return folder


def test_two_processes_learn_what_one_learns(square_images, whole, tmp_path):
    """Measured: losses to 1e-7, weights to 1e-4 of the way they went since the first checkpoint.

    AdamW makes steps of one length out of gradients that are nothing but rounding, such as those of
    the biases of keys: single weights differ by up to 0.5 % of their way.
    """
    run(*overrides(square_images, tmp_path, **RUN))
    one, two = metrics(tmp_path), metrics(whole)
    assert len(one) == len(two) == RUN["train.max_iter"] + 1
    for name in ("total_loss", "grad_norm", "labels/gained"):
        expected = [line[name] for line in one[:-1]]
        assert [line[name] for line in two[:-1]] == pytest.approx(expected, rel=1e-5), name

    finals = [checkpoint_of(path) for path in (tmp_path, whole)]
    # The names are the same, so that each run can resume the other.
    assert finals[0]["run"]["parameters"] == finals[1]["run"]["parameters"]
    last, other = (final["model"] for final in finals)
    first = checkpoint_of(whole, "model_0000001.pth")["model"]
    way = {name: (last[name] - first[name]).double().norm() for name in last}
    gap = {name: (last[name] - other[name]).double().norm() for name in last}
    for name in last:
        assert gap[name] <= 0.03 * way[name], name
    total_way, total_gap = (torch.stack([*norms.values()]).norm() for norms in (way, gap))
    assert 0 < total_gap < 1e-3 * total_way


@pytest.mark.slow
def test_torchrun_starts_again_what_was_killed(square_images, whole, tmp_path):
    """It goes on from the last checkpoint without being told, and ends as if nothing had been."""
    log, folder = tmp_path / "log", tmp_path / "run"
    launcher = (*TORCHRUN, "--max-restarts=1")
    with started(*overrides(square_images, folder, **RUN), log=log, launcher=launcher) as process:
        wait_for(lambda: last_checkpoint(folder) and len(ranks_of(process)) == 2, process)
        os.kill(ranks_of(process)[0], signal.SIGKILL)
        assert process.wait(2 * SECONDS) == 0
    begun = re.findall(r"Starting training from iteration (\d+)", log.read_text())
    assert len(begun) == 2 and int(begun[1]) > int(begun[0]) == 0
    assert_same_weights(folder, whole)


def test_an_attempt_does_not_see_what_the_one_before_left(monkeypatch):
    """torchrun's store outlives a restart, and with it addresses of processes that are gone."""
    agent = dist.TCPStore("localhost", 0, is_master=True)
    for name, value in {
        "MASTER_ADDR": "localhost", "MASTER_PORT": agent.port, "RANK": 0, "WORLD_SIZE": 1,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }.items():
        monkeypatch.setenv(name, str(value))
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        timeout = timedelta(seconds=20)
        dist.init_process_group("gloo", timeout=timeout, **torchrun_store(timeout))
        try:
            assert dist.distributed_c10d._get_default_store().add("seen", 1) == 1
        finally:
            dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_killed_and_stopped_run_ends_like_a_whole_one(square_images, whole, tmp_path, number):
    """SIGKILL to one process ends all; the other signals save what is done.

    They come to the parent, and Ctrl-C to all of its process group.
    """
    log, folder = tmp_path / "log", tmp_path / "run"

    def interrupt(interruption, *arguments):
        before = last_checkpoint(folder)
        log.write_text("")
        arguments = ("--num-gpus", 2, *arguments, *overrides(square_images, folder, **RUN))
        with started(*arguments, log=log) as process:
            wait_for(lambda: last_checkpoint(folder) != before, process)
            interruption(process)
            return process.wait(SECONDS), log.read_text()

    code, said = interrupt(lambda process: os.kill(ranks_of(process)[1], signal.SIGKILL))
    assert code == 1
    assert "error: process 1 terminated with signal SIGKILL" in said
    assert "Traceback" not in said
    tell = os.killpg if number == signal.SIGINT else os.kill
    code, said = interrupt(lambda process: tell(process.pid, number), "--resume")
    assert code == 75
    assert said.count("stopped and saved") == 1
    assert "error:" not in said and "Traceback" not in said
    done = checkpoint_of(folder, last_checkpoint(folder))["iteration"] + 1
    said = run("--resume", *overrides(square_images, folder, **RUN), launcher=TORCHRUN)
    assert f"Starting training from iteration {done}" in said
    assert_same_weights(folder, whole)


def test_an_error_of_one_process_ends_the_run_and_is_told(tmp_path):
    """Here an image that only the second process meets."""
    square = make_shapes(tmp_path, images=4, size=(64, 64))
    image = square.parent / "images" / "0003.png"
    image.write_bytes(b"none")
    launcher = (*TORCHRUN, "--tee=3")  # says which process has written a line
    said = run(*overrides(square, tmp_path / "run", **RUN), launcher=launcher, expect=1)
    assert said.count("error: cannot read") == 1
    assert f"[default1]:error: cannot read {image}: " in said
    assert "Exception during training" not in said  # a traceback, in Detectron2
