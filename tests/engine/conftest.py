"""Runs in this process, and data for them, that several test files of this room share."""

import itertools
import os
import signal

import pytest
import train_net
from detectron2.utils.env import seed_all_rng

from projects.stageinteractor.engine.trainer import Trainer
from support.runs import CONFIG, ROOT, Killed, overrides
from support.shapes import make_shapes

RUN = {
    "train.max_iter": 8,
    "train.eval_period": 4,
    "train.checkpointer.period": 2,
    "train.log_period": 3,
    "train.seed": 5,
    "train.model_ema.enabled": "true",
    "train.model_ema.decay": 0.9,
}


@pytest.fixture(scope="session")
def square_images(tmp_path_factory):
    """Images of one size: no process pads another's, and none waits for its like."""
    return make_shapes(tmp_path_factory.mktemp("shapes"), images=4, size=(64, 64))


@pytest.fixture(scope="session")
def mixed_images(tmp_path_factory):
    """Wide and tall images, so that batches wait for their like."""
    sizes = [(64, 96), (96, 64), (64, 64)]
    return make_shapes(tmp_path_factory.mktemp("shapes"), images=7, size=sizes)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Six images, the last one without objects."""
    return make_shapes(tmp_path_factory.mktemp("shapes"), images=6, size=(64, 96), empty=True)


@pytest.fixture
def train(mixed_images, monkeypatch):
    """The command's main() in this process."""
    monkeypatch.chdir(ROOT)
    # Everything else that it does would outlive the test.
    monkeypatch.setattr(train_net, "start_log", lambda cfg, args: seed_all_rng(cfg.train.seed))
    # Pictures take half of the time, and have their own tests.
    monkeypatch.setattr(train_net, "PredictionPictures", lambda *args: None)

    def train(folder, *arguments, **options):
        options = overrides(mixed_images, folder, **{**RUN, **options})
        arguments = ["--config-file", CONFIG, *arguments, *options]
        train_net.main(train_net.parse_arguments(arguments))

    return train


@pytest.fixture
def before(monkeypatch):
    """Have something happen before the n-th call of a function, counted from 1."""

    def before(owner, name, number, happen):
        original, calls = getattr(owner, name), itertools.count(1)

        def replacement(*args, **kwargs):
            if next(calls) == number:
                happen()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, replacement)

    return before


@pytest.fixture
def train_killed(train, before):
    """Train until the n-th call of a function, and end there as abruptly as a process can."""

    def kill():
        raise Killed

    def train_killed(owner, name, number, folder, *arguments, **options):
        before(owner, name, number, kill)
        with pytest.raises(Killed):
            train(folder, *arguments, **options)

    return train_killed


@pytest.fixture
def train_stopped(train, before):
    """Train for some steps, until a signal stops the run, and return the exit code."""

    def train_stopped(steps, folder, **options):
        before(Trainer, "run_step", steps, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            train(folder, **options)
        return ended.value.code

    return train_stopped


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(whole_folder, train):
    """The folder of a run without an interruption, which tests do not change."""
    if not (whole_folder / "model_final.pth").exists():
        train(whole_folder)
    return whole_folder
