"""A run that was interrupted and resumed ends like one that was not, to the last bit."""

import json

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from runs import CONFIG, ROOT, metrics, overrides
from shapes import make_shapes
from torch.utils._pytree import tree_flatten_with_path

from projects.stageinteractor.engine import Trainer
from tools import train_net

TIMES = ("time", "data_time", "rank_data_time", "eta_seconds", "images_per_second", "memory")
RUN = {
    "train.max_iter": 8,
    "train.eval_period": 4,
    "train.checkpointer.period": 2,
    "train.log_period": 3,
    "train.seed": 5,
    "train.model_ema.enabled": "true",
    "train.model_ema.decay": 0.9,
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Wide and tall images, so that batches wait for their like."""
    sizes = [(64, 96), (96, 64), (64, 64)]
    return make_shapes(tmp_path_factory.mktemp("shapes"), images=7, size=sizes)


class Killed(BaseException):
    """Ends a run as abruptly as can be within a process."""


@pytest.fixture
def train(shapes, monkeypatch):
    """The command's main() in this process, on request killed as an iteration starts or ends."""
    monkeypatch.chdir(ROOT)

    def seed_only(cfg, args):  # its log would outlive the test
        seed_all_rng(cfg.train.seed)

    monkeypatch.setattr(train_net, "default_setup", seed_only)

    def train(folder, *arguments, kill_in=None, kill=None, **options):
        options = overrides(shapes, folder, **{**RUN, **options})
        arguments = ["--config-file", CONFIG, *arguments, *options]
        with monkeypatch.context() as patch:
            if kill_in is not None:
                owner, method = kill
                original = getattr(owner, method)

                def killed(trainer, *args, **kwargs):
                    if trainer.iter == kill_in:
                        raise Killed
                    return original(trainer, *args, **kwargs)

                patch.setattr(owner, method, killed)
                with pytest.raises(Killed):
                    train_net.main(train_net.parse_arguments(arguments))
            else:
                train_net.main(train_net.parse_arguments(arguments))

    return train


def state_of(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


def numbers_of(folder):
    """What metrics.json says, without what depends on the machine's speed."""
    lines = metrics(folder)
    return [json.dumps({k: v for k, v in line.items() if k not in TIMES}) for line in lines]


def assert_equal(one, other):
    for state in (one, other):
        writer = state["trainer"]["hooks"]["PeriodicWriter"]
        for name in [*TIMES, "file_size"]:  # times have lengths of their own in the file
            writer.pop(name, None), writer["scalars"].pop(name, None)
    (leaves, tree), (others, other_tree) = map(tree_flatten_with_path, (one, other))
    assert tree == other_tree
    for (path, a), (_, b) in zip(leaves, others):
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else repr(a) == repr(b)  # NaN too
        assert same, path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


KILLS = [
    (3, (Trainer, "run_step")),  # after a checkpoint and before the next one
    (4, (Trainer, "run_step")),  # just after an evaluation
    (1, (Trainer, "run_step")),  # before the first checkpoint
]


@pytest.mark.parametrize("kill_in, kill", KILLS)
def test_an_interrupted_run_ends_like_a_whole_one(train, tmp_path, whole, kill_in, kill):
    if not (whole / "model_final.pth").exists():
        train(whole)
    train(tmp_path, kill_in=kill_in, kill=kill)
    train(tmp_path, "--resume")
    assert_equal(state_of(whole), state_of(tmp_path))
    assert numbers_of(whole) == numbers_of(tmp_path)
    assert "".join(numbers_of(whole)).count("bbox/AP50") == 2
