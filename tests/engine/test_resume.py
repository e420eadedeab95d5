"""A run that was interrupted and resumed ends like one that was not, to the last bit."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
import train_net
from torch.nn.functional import dropout
from torch.utils._pytree import tree_flatten_with_path

from projects.stageinteractor.engine.processes import EXIT_CODE
from projects.stageinteractor.engine.trainer import Trainer
from projects.stageinteractor.errors import UserError
from support.disks import limited_files
from support.runs import ROOT, checkpoint_of, metrics

TIMES = (
    "time", "data_time", "rank_data_time", "eta_seconds", "eval_seconds", "images_per_second",
    "memory",
)


def numbers_of(folder):
    """What metrics.json says, without what depends on the machine's speed."""
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(folder)]
    return [json.dumps(line) for line in lines if line.keys() != {"iteration"}]


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


def assert_same_run(one, other):
    assert_equal(checkpoint_of(one), checkpoint_of(other))
    assert numbers_of(one) == numbers_of(other)


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_run_killed_in_an_evaluation_ends_like_a_whole_one(
    evaluation, whole, train, train_killed, tmp_path
):
    train_killed(train_net, "evaluate", evaluation, tmp_path)
    train(tmp_path, "--resume")
    assert_same_run(whole, tmp_path)
    assert "".join(numbers_of(whole)).count("bbox/AP50") == 2


def test_a_run_killed_again_and_again_ends_like_a_whole_one(whole, train, train_killed, tmp_path):
    """At first before there is a checkpoint, then after one, and after an evaluation."""
    train_killed(Trainer, "run_step", 2, tmp_path, "--resume")
    for _ in range(3):
        train_killed(Trainer, "run_step", 4, tmp_path, "--resume")
    train(tmp_path, "--resume")
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize("owner, name, count, number", [
    (Trainer, "run_step", 5, signal.SIGTERM),
    (train_net, "evaluate", 1, signal.SIGINT),
    (train_net, "evaluate", 2, signal.SIGUSR1),
])
def test_a_stopped_run_goes_on_where_it_was(
    owner, name, count, number, whole, train, before, tmp_path, capfd
):
    """It ends the step, or leaves the evaluation, and loses nothing."""
    if number == signal.SIGINT:  # a shell's background job starts with it ignored
        signal.signal(number, signal.default_int_handler)
    handler = signal.getsignal(number)
    before(owner, name, count, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        train(tmp_path)
    assert ended.value.code == EXIT_CODE == 75
    said = capfd.readouterr().err
    assert "stopped and saved" in said and "--resume" in said and "75" in said
    assert signal.getsignal(number) == handler  # as it was
    last = checkpoint_of(tmp_path, (tmp_path / "last_checkpoint").read_text())
    steps = count if name == "run_step" else 4 * count  # an evaluation every four
    assert last["iteration"] == last["trainer"]["iteration"] == steps - 1
    train(tmp_path, "--resume")
    assert_same_run(whole, tmp_path)


VARIANTS = [
    {"dataloader.train.num_workers": 2, "train.accumulation_steps": 2},
    pytest.param(
        {"train.amp.enabled": "true", "train.amp.dtype": "float16"}, marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: next(iter(options)))
def test_options_that_have_a_state_resume_too(options, train, train_killed, tmp_path):
    options = {**options, "train.max_iter": 4, "train.eval_period": 0}
    train(tmp_path / "whole", **options)
    train_killed(Trainer, "run_step", 4, tmp_path / "killed", **options)
    train(tmp_path / "killed", "--resume", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_what_a_model_draws_at_random_comes_again(train, train_killed, tmp_path, monkeypatch):
    """Here features that are dropped; evaluations in between draw from other numbers."""
    build_distributed_model = train_net.build_distributed_model

    def drop(neck, inputs, maps):
        return [dropout(features, 0.5, neck.training) for features in maps]

    def build_with_dropout(cfg):
        model = build_distributed_model(cfg)
        model.neck.register_forward_hook(drop)
        return model

    monkeypatch.setattr(train_net, "build_distributed_model", build_with_dropout)
    short = {"train.max_iter": 4, "train.eval_period": 0}
    train(tmp_path / "whole", **short)
    train_killed(Trainer, "run_step", 3, tmp_path / "killed", **short)
    train(tmp_path / "killed", "--resume", **{**short, "train.eval_period": 3})
    whole, killed = (checkpoint_of(tmp_path / name)["model"] for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_run_that_is_complete_may_be_resumed(train, tmp_path):
    """Its last checkpoint is the best one, saved after the last iteration; nothing is left to do.

    Or less than nothing, with a shorter schedule; or more, with a longer one.
    """
    options = {"train.eval_period": 0, "train.max_iter": 2}
    train(tmp_path, **options)
    assert (tmp_path / "last_checkpoint").read_text() == "model_best.pth"
    done = checkpoint_of(tmp_path)
    for length in (2, 1):
        train(tmp_path, "--resume", **{**options, "train.max_iter": length})
        again = checkpoint_of(tmp_path)
        assert torch.equal(*(state["model"]["neck.norm.weight"] for state in (done, again)))
    train(tmp_path, "--resume", **{**options, "train.max_iter": 4})
    final = checkpoint_of(tmp_path)
    assert (final["iteration"], final["data"]["images"]) == (3, 8)


def test_an_error_in_the_last_step_is_not_evaluated_first(train, before, tmp_path, capfd):
    def fail():
        raise UserError("the last step fails")

    before(Trainer, "run_step", 2, fail)
    before(train_net, "evaluate", 1, lambda: pytest.fail("it was evaluated"))
    with pytest.raises(SystemExit):
        train(tmp_path, **{"train.max_iter": 2})
    assert "error: the last step fails" in capfd.readouterr().err


def test_a_moving_average_begins_with_the_weights_that_were_loaded(
    train, train_killed, tmp_path, monkeypatch
):
    """Where it is switched on for the rest of a run, and the last step is evaluated first."""
    options = {"train.checkpointer.period": 1, "train.eval_period": 1, "train.max_iter": 2}
    plain = {**options, "train.model_ema.enabled": "false"}
    train_killed(train_net, "evaluate", 1, tmp_path, **plain)
    saved = checkpoint_of(tmp_path, "model_0000000.pth")["model"]
    evaluated = []
    monkeypatch.setattr(
        train_net, "evaluate", lambda cfg, model, *_, **__: evaluated.append(
            {name: value.clone() for name, value in model.state_dict().items()}
        ) or {"bbox": {"AP": 0.0}}
    )
    train(tmp_path, "--resume", **options)
    assert all(torch.equal(saved[name], value) for name, value in evaluated[0].items())


def test_a_checkpoint_of_an_earlier_version_resumes(whole, train, tmp_path):
    """It contains nothing about data, seeds and numbers."""
    state = checkpoint_of(whole)
    for key in ("data", "run"):
        del state[key]
    for hook in ("StepSeeds", "PeriodicWriter"):
        del state["trainer"]["hooks"][hook]
    del state["trainer"]["skipped_steps"]
    torch.save(state, tmp_path / "model_0000007.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    shutil.copy(whole / "metrics.json", tmp_path)
    train(tmp_path, "--resume", **{"train.max_iter": 9})
    assert checkpoint_of(tmp_path)["iteration"] == 8
    assert metrics(tmp_path)[:len(metrics(whole))] == metrics(whole)  # nothing was cut off


def test_a_full_disk_ends_a_run_with_what_to_do(whole, train, tmp_path, capsys):
    """First a log has no room, then a checkpoint; the run goes on when there is some.

    What it prints is kept in memory, because the limit would also apply to capfd's own file.
    """
    for size in (500, 20_000):
        with limited_files(size), pytest.raises(SystemExit) as ended:
            train(tmp_path, "--resume")
        assert ended.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        assert len(errors) == 1 and "File too large" in lines[errors[0]]
        assert lines[errors[0] + 1].startswith("Make room")
    train(tmp_path, "--resume")
    assert_same_run(whole, tmp_path)


def test_a_living_run_keeps_its_folder(tmp_path, capfd, train):
    """Even from a run that resumes. A process that was killed does not."""
    holder = (
        "import sys; from projects.stageinteractor.engine.setup import lock\n"
        "with open(sys.argv[1], 'a+') as file: lock(file); print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path / "run.lock"], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(SystemExit) as ended:
            train(tmp_path, "--resume")
        said = capfd.readouterr().err
        assert ended.value.code == 1 and sorted(p.name for p in tmp_path.iterdir()) == before
        assert f"{tmp_path} is in use" in said
        assert f"process {process.pid} on {socket.gethostname()}" in said
        process.kill()
    with pytest.raises(SystemExit):  # past the lock
        train(tmp_path, "--resume", **{"model.decoder.num_classes": 4})
    assert "num_classes=4" in capfd.readouterr().err
