"""Several machines: network namespaces with addresses of their own, joined by a link that is cut.

Needs root and ``ip netns``, and nothing of the network outside.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from support.runs import (
    assert_same_weights,
    checkpoint_of,
    last_checkpoint,
    overrides,
    ranks_of,
    run,
    started,
    wait_for,
)

HAS_NAMESPACES = shutil.which("ip") and os.geteuid() == 0 and not subprocess.run(
    ["ip", "netns", "add", "stageinteractor-try"], stderr=subprocess.DEVNULL
).returncode
if HAS_NAMESPACES:
    subprocess.run(["ip", "netns", "delete", "stageinteractor-try"], check=True)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_NAMESPACES, reason="needs root and ip netns"),
]
ADDRESSES = "10.77.0.1", "10.77.0.2"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
RUN = {"train.max_iter": 30, "train.eval_period": 0, "train.seed": 3}
TIMEOUT = 20  # of the command, in seconds
SECONDS = TIMEOUT + 40  # in which a run ends that has lost the link: on a busy machine, else in 25


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, timeout=30)


@pytest.fixture
def machines():
    """Names of two namespaces, each with one end of a link, ``eth0``."""
    names = [f"stageinteractor-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        first, second = names
        ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "eth0", "netns", second)
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in names:
            left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in left.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name])


@pytest.fixture(scope="module")
def whole(square_images, tmp_path_factory):
    """The run of two processes on one machine."""
    folder = tmp_path_factory.mktemp("whole")
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node=2")
    run(*overrides(square_images, folder, **RUN), launcher=launcher)
    return folder


@pytest.fixture
def train(machines, square_images, tmp_path):
    """Starts a run of one process a machine; gives the torchrun of each and its log."""

    @contextlib.contextmanager
    def train(*arguments, of_torchrun=(), ranks=(0, 1)):
        options = overrides(square_images, tmp_path / "run", **RUN)
        arguments = (f"--timeout={TIMEOUT}", *arguments, *options)
        logs = [tmp_path / f"log{rank}" for rank in ranks]
        with contextlib.ExitStack() as stack:
            processes = []
            for rank, log in zip(ranks, logs):
                log.write_text("")
                launcher = (
                    "ip", "netns", "exec", machines[rank], *TORCHRUN, "--nnodes=2",
                    f"--node-rank={rank}", "--nproc-per-node=1", f"--master-addr={ADDRESSES[0]}",
                    "--master-port=29400", *of_torchrun,
                )
                process = started(
                    *arguments, log=log, launcher=launcher, GLOO_SOCKET_IFNAME="eth0"
                )
                processes.append(stack.enter_context(process))
            yield processes, logs

    return train


def test_two_machines_train_like_one(train, whole, tmp_path):
    """Gloo adds up in the same order over a network and within a machine."""
    with train() as (processes, logs):
        assert [process.wait(120) for process in processes] == [0, 0]
    assert_same_weights(tmp_path / "run", whole)


def test_a_run_that_lost_the_link_ends_and_resumes(machines, train, whole, tmp_path):
    """Both machines end with an error and go on with --resume, to the weights of one machine."""
    folder = tmp_path / "run"
    with train() as (processes, logs):
        wait_for(lambda: last_checkpoint(folder), processes[0])
        ip("-n", machines[0], "link", "set", "eth0", "down")
        cut = time.monotonic()
        for process, log in zip(processes, logs):
            assert process.wait(SECONDS) == 1
            assert log.read_text().count("error: lost contact with another process") == 1
            assert "Exception during training" not in log.read_text()
        assert time.monotonic() - cut < SECONDS
    done = checkpoint_of(folder, last_checkpoint(folder))["iteration"] + 1
    assert 0 < done < RUN["train.max_iter"]

    ip("-n", machines[0], "link", "set", "eth0", "up")
    with train("--resume") as (processes, logs):
        assert [process.wait(120) for process in processes] == [0, 0]
    assert f"Starting training from iteration {done}" in logs[0].read_text()
    assert_same_weights(folder, whole)


def test_machines_start_again_what_was_killed_on_one(train, whole, tmp_path):
    """With --max-restarts on both: they find each other, and go on from the last checkpoint."""
    folder = tmp_path / "run"
    with train(of_torchrun=["--max-restarts=1"]) as (processes, logs):
        wait_for(lambda: last_checkpoint(folder), processes[0])
        os.kill(ranks_of(processes[1])[0], signal.SIGKILL)
        assert [process.wait(120) for process in processes] == [0, 0]
    assert logs[0].read_text().count("Starting training from iteration") == 2
    assert_same_weights(folder, whole)


@pytest.mark.parametrize("rank, said", [(0, "1/2 clients joined"), (1, "trying to connect to")])
def test_a_machine_does_not_wait_forever_for_the_other(train, rank, said):
    """The second one may try twice. These errors are torchrun's, and its default is 15 minutes."""
    with train(of_torchrun=["--rdzv-conf=timeout=10"], ranks=[rank]) as ([process], [log]):
        assert process.wait(SECONDS) == 1
    assert said in log.read_text()


def test_a_signal_to_one_machine_saves_the_run_of_both(train, tmp_path):
    with train() as (processes, logs):
        wait_for(lambda: last_checkpoint(tmp_path / "run"), processes[0])
        processes[1].terminate()
        assert [process.wait(SECONDS) for process in processes] == [1, 1]
    assert logs[0].read_text().count("stopped and saved: --resume continues") == 1
    assert "error:" not in logs[0].read_text() + logs[1].read_text()
