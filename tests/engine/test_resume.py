"""A run that was interrupted and resumed ends like one that was not, to the last bit."""

import itertools
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
import train_net
from detectron2.data import MetadataCatalog
from detectron2.utils.env import seed_all_rng
from omegaconf import OmegaConf
from torch.nn.functional import dropout
from torch.utils._pytree import tree_flatten_with_path

from projects.stageinteractor.engine import resume
from projects.stageinteractor.engine.processes import EXIT_CODE
from projects.stageinteractor.engine.resume import fingerprint, other_images, other_parameters
from projects.stageinteractor.engine.setup import sole_use
from projects.stageinteractor.engine.trainer import Trainer
from projects.stageinteractor.errors import UserError
from support.disks import limited_files
from support.runs import CONFIG, ROOT, metrics, overrides
from support.shapes import make_shapes

TIMES = ("time", "data_time", "rank_data_time", "eta_seconds", "eval_seconds", "images_per_second",
         "memory")
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
    """The command's main() in this process."""
    monkeypatch.chdir(ROOT)
    # All that it does besides would outlive the test.
    monkeypatch.setattr(train_net, "start_log", lambda cfg, args: seed_all_rng(cfg.train.seed))

    def train(folder, *arguments, **options):
        options = overrides(shapes, folder, **{**RUN, **options})
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


def kill():
    raise Killed


def state_of(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


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


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(whole_folder, train):
    """The run without an interruption."""
    if not (whole_folder / "model_final.pth").exists():
        train(whole_folder)
    return whole_folder


def assert_same_run(one, other):
    assert_equal(state_of(one), state_of(other))
    assert numbers_of(one) == numbers_of(other)


PLACES = {
    "after a checkpoint": (Trainer, "run_step", 4),
    "after an evaluation": (Trainer, "run_step", 5),
    "in an evaluation": (train_net, "evaluate", 1),
    "in the last evaluation": (train_net, "evaluate", 2),
}


# They have one handler.
OTHERS = [("after a checkpoint", signal.SIGUSR1), ("in an evaluation", signal.SIGINT)]


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_ends_like_a_whole_one(place, whole, train, before, tmp_path):
    before(*PLACES[place], kill)
    with pytest.raises(Killed):
        train(tmp_path)
    train(tmp_path, "--resume")
    assert_same_run(whole, tmp_path)
    assert "".join(numbers_of(whole)).count("bbox/AP50") == 2


def test_a_run_killed_again_and_again_ends_like_a_whole_one(whole, train, before, tmp_path):
    """At first before there is a checkpoint."""
    before(Trainer, "run_step", 2, kill)
    with pytest.raises(Killed):
        train(tmp_path, "--resume")
    for _ in range(3):
        before(Trainer, "run_step", 4, kill)
        with pytest.raises(Killed):
            train(tmp_path, "--resume")
    train(tmp_path, "--resume")
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize("place, number", [*((p, signal.SIGTERM) for p in PLACES), *OTHERS])
def test_a_stopped_run_goes_on_where_it_was(place, number, whole, train, before, tmp_path, capfd):
    """It ends the step, or leaves the evaluation, and loses nothing."""
    handler = signal.getsignal(number)
    owner, name, count = PLACES[place]
    before(owner, name, count, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        train(tmp_path)
    assert ended.value.code == EXIT_CODE == 75
    said = capfd.readouterr().err
    assert "stopped and saved" in said and "--resume" in said and "75" in said
    assert signal.getsignal(number) == handler  # as it was
    last = torch.load(tmp_path / (tmp_path / "last_checkpoint").read_text(), weights_only=True)
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
def test_options_that_have_a_state_resume_too(options, train, before, tmp_path):
    train(tmp_path / "whole", **options)
    before(Trainer, "run_step", 4, kill)
    with pytest.raises(Killed):
        train(tmp_path / "killed", **options)
    train(tmp_path / "killed", "--resume", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_what_a_model_draws_at_random_comes_again(train, before, tmp_path, monkeypatch):
    """Here features that are dropped; evaluations in between draw from other numbers."""
    build_distributed_model = train_net.build_distributed_model

    def drop(neck, inputs, maps):
        return [dropout(features, 0.5, neck.training) for features in maps]

    def build_with_dropout(cfg):
        model = build_distributed_model(cfg)
        model.neck.register_forward_hook(drop)
        return model

    monkeypatch.setattr(train_net, "build_distributed_model", build_with_dropout)
    train(tmp_path / "whole")
    before(Trainer, "run_step", 4, kill)
    with pytest.raises(Killed):
        train(tmp_path / "killed")
    train(tmp_path / "killed", "--resume", **{"train.eval_period": 3})
    whole, killed = (state_of(tmp_path / name)["model"] for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.fixture
def warnings(caplog):
    resume.LOGGER.propagate = True
    return lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def stop_after(train, before, folder, steps, **options):
    before(Trainer, "run_step", steps, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(folder, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dataloader.train.total_batch_size": 4},
         "4 images a step instead of 2: training continues after the same number of steps"),
        ({"optimizer.lr": 0.5}, "the learning rate of the run, 0.0003, stays"),
        ({"train.max_iter": 6}, "6 iterations instead of 8: the schedule is stretched to them"),
        ({"dataloader.train.num_workers": 1}, None),
    ],
)
def test_what_is_different_is_said(options, message, train, before, tmp_path, warnings):
    stop_after(train, before, tmp_path, 4)
    train(tmp_path, "--resume", **options)
    found = [text for text in warnings() if text.startswith("resuming: ")]
    assert len(found) == (message is not None)
    assert all(text.startswith(f"resuming: {message}") for text in found)
    final = state_of(tmp_path)
    assert final["iteration"] + 1 == options.get("train.max_iter", 8)
    groups = final["trainer"]["optimizer"]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {3e-4}
    batch = options.get("dataloader.train.total_batch_size", 2)
    assert final["data"]["images"] == 4 * 2 + (final["iteration"] - 3) * batch


def test_another_number_of_processes_is_said(train, before, tmp_path, warnings):
    stop_after(train, before, tmp_path, 5)
    state = torch.load(tmp_path / "model_0000004.pth", weights_only=True)
    state["run"]["processes"] = 2
    names = state["run"]["parameters"]  # version 0.1 saved them with a prefix
    state["run"]["parameters"] = [[f"module.{name}" for name in group] for group in names]
    torch.save(state, tmp_path / "model_0000004.pth")
    train(tmp_path, "--resume")
    expected = "resuming: 1 processes instead of 2: images come in the same order"
    assert [text.startswith(expected) for text in warnings()] == [True]


def test_a_run_that_is_complete_may_be_resumed(train, before, tmp_path):
    """Its last checkpoint is the best one, saved after the last iteration; nothing is left to do.

    Or less than nothing, with a shorter schedule; or more, with a longer one.
    """
    train(tmp_path, **{"train.eval_period": 0})
    assert (tmp_path / "last_checkpoint").read_text() == "model_best.pth"
    done = state_of(tmp_path)
    for length in (8, 4):
        train(tmp_path, "--resume", **{"train.eval_period": 0, "train.max_iter": length})
        assert torch.equal(*(s["model"]["neck.norm.weight"] for s in (done, state_of(tmp_path))))
    train(tmp_path, "--resume", **{"train.eval_period": 0, "train.max_iter": 10})
    final = state_of(tmp_path)
    assert (final["iteration"], final["data"]["images"]) == (9, 20)


def test_an_error_in_the_last_step_is_not_evaluated_first(train, before, tmp_path, capfd):
    def fail():
        raise UserError("the last step fails")

    before(Trainer, "run_step", 8, fail)
    before(train_net, "evaluate", 2, kill)
    with pytest.raises(SystemExit):
        train(tmp_path)
    assert "error: the last step fails" in capfd.readouterr().err


def test_a_moving_average_begins_with_the_weights_that_were_loaded(
    train, before, tmp_path, monkeypatch
):
    """Where it is switched on for the rest of a run, and the last step is evaluated first."""
    plain = {"train.model_ema.enabled": "false"}
    before(train_net, "evaluate", 1, kill)
    with pytest.raises(Killed):
        train(tmp_path, **plain)
    saved = torch.load(tmp_path / "model_0000003.pth", weights_only=True)["model"]
    evaluated = []
    monkeypatch.setattr(
        train_net, "evaluate", lambda cfg, model, *_, **__: evaluated.append(
            {name: value.clone() for name, value in model.state_dict().items()}
        ) or {"bbox": {"AP": 0.0}}
    )
    train(tmp_path, "--resume")
    assert all(torch.equal(saved[name], value) for name, value in evaluated[0].items())


def test_a_schedule_in_epochs_goes_on_at_the_same_epoch(train, before, tmp_path, warnings):
    """7 images, 2 a step: 4 steps an epoch. With 4 a step there are 2, and 3 epochs take 6."""
    options = {"train.max_iter": None, "train.epochs": 3}
    stop_after(train, before, tmp_path, 4, **options)
    train(tmp_path, "--resume", **options, **{"dataloader.train.total_batch_size": 4})
    assert any("after the same epoch, at iteration 2" in text for text in warnings())
    final = state_of(tmp_path)
    assert final["iteration"] == 5 and final["data"]["images"] == 8 + 4 * 4


def test_a_checkpoint_of_before_resumes(whole, train, tmp_path):
    """One that says nothing of data, seeds and numbers: an earlier version wrote such."""
    state = state_of(whole)
    for key in ("data", "run"):
        del state[key]
    for hook in ("StepSeeds", "PeriodicWriter"):
        del state["trainer"]["hooks"][hook]
    del state["trainer"]["skipped_steps"]
    torch.save(state, tmp_path / "model_0000007.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    shutil.copy(whole / "metrics.json", tmp_path)
    train(tmp_path, "--resume", **{"train.max_iter": 9})
    assert state_of(tmp_path)["iteration"] == 8
    assert metrics(tmp_path)[:len(metrics(whole))] == metrics(whole)  # nothing was cut off


def test_old_checkpoints_are_removed_also_those_of_before(train, before, tmp_path):
    options = {"train.checkpointer.period": 1, "train.checkpointer.max_to_keep": 2}
    stop_after(train, before, tmp_path, 4, **options)
    (tmp_path / "model_0000004.pth.tmp").write_bytes(b"half of it")
    (tmp_path / "mine.tmp").mkdir()
    train(tmp_path, "--resume", **options)
    assert sorted(path.name for path in tmp_path.glob("model_0*")) == [
        "model_0000006.pth", "model_0000007.pth"
    ]
    assert (tmp_path / "mine.tmp").exists()


@pytest.mark.parametrize("size", [500, 20_000])
def test_a_full_disk_ends_a_run_with_what_to_do(size, whole, train, tmp_path, capfd):
    """Whether a log or a checkpoint has no room; the run goes on when there is some."""
    with limited_files(size), pytest.raises(SystemExit) as ended:
        train(tmp_path)
    assert ended.value.code == 1
    lines = capfd.readouterr().err.splitlines()
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1 and "File too large" in lines[errors[0]]
    assert lines[errors[0] + 1].startswith("Make room")
    train(tmp_path, "--resume")
    assert_same_run(whole, tmp_path)


def changed(annotations, change):
    """The file of a variant of annotations, beside their images."""
    coco = json.loads(annotations.read_text())
    change(coco)
    path = annotations.parent / f"{change.__name__}.json"
    path.write_text(json.dumps(coco))
    return path


def data_of(file):
    return {f"dataloader.{split}.dataset.json_file": file for split in ("train", "test")}


def move_a_box(coco):
    coco["annotations"][0]["bbox"][2] += 1


def drop_an_image(coco):
    image = coco["images"].pop()
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != image["id"]]


def rename_a_class(coco):
    coco["categories"][1]["name"] = "disc"


def swap_classes(coco):
    first, second = coco["categories"][:2]
    first["name"], second["name"] = second["name"], first["name"]


def add_a_class(coco):
    coco["categories"].append({"id": 4, "name": "star"})


@pytest.fixture
def refused(whole, train, tmp_path, capfd):
    """Resumes a copy of the whole run with other options, and returns the one error."""

    def refused(old=(), **options):
        folder = tmp_path / "run"
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        state = torch.load(folder / "model_final.pth", weights_only=True)
        for key in old:
            del state["run"][key]
        torch.save(state, folder / "model_final.pth")
        before = metrics(folder)
        with pytest.raises(SystemExit) as ended:
            train(folder, "--resume", **options)
        assert ended.value.code == 1 and metrics(folder) == before
        first, second = capfd.readouterr().err.split("error: ")[1].splitlines()
        assert f"train.init_checkpoint={folder}/" in second
        assert "train.output_dir=NEW_FOLDER" in second
        return first, "train.accept_changes=true" in second

    return refused


@pytest.mark.parametrize("old", [(), ("images", "parameters")])
@pytest.mark.parametrize("options, parts", [
    ({"model.query_generator.num_queries": 12}, ["(10, ", "(12, "]),
    ({"model.decoder.points_per_stage": "[8,8,8,8]"}, ["decoder.stages.3", "is not there"]),
])
def test_another_shape_is_not_resumed(options, parts, old, refused):
    first, may_be_accepted = refused(old, **options, **{"train.accept_changes": "true"})
    assert all(part in first for part in parts) and not may_be_accepted, first


def test_more_classes_are_not_resumed(shapes, refused):
    more = data_of(changed(shapes, add_a_class))
    first, may_be_accepted = refused(**more, **{"model.decoder.num_classes": 4})
    assert not may_be_accepted
    assert "class_head" in first and "star" in first and "(3, " in first and "(4, " in first


@pytest.mark.parametrize("old", [(), ("images", "parameters")])
def test_other_frozen_parts_are_not_resumed(old, refused):
    first, may_be_accepted = refused(old, **{"model.backbone.frozen_modules": "[]"})
    assert not may_be_accepted
    assert ("parameters in" if old else "backbone.") in first


@pytest.mark.parametrize("change, parts", [
    (move_a_box, ["dataloader.train: 1 with other boxes", "dataloader.test: 1 with other boxes"]),
    (drop_an_image, ["dataloader.train: 1 missing"]),
    (rename_a_class, ["circle", "disc"]),
    (swap_classes, ["rectangle", "circle"]),
])
def test_other_data_is_resumed_only_where_that_is_accepted(
    change, parts, shapes, refused, train, tmp_path, warnings
):
    data = data_of(changed(shapes, change))
    first, may_be_accepted = refused(**data)
    assert all(part in first for part in parts) and may_be_accepted, first
    accepted = {**data, "train.accept_changes": "true", "train.max_iter": 9}
    train(tmp_path / "run", "--resume", **accepted)
    assert any(first.partition(": ")[2] in text for text in warnings())
    assert state_of(tmp_path / "run")["iteration"] == 8
    train(tmp_path / "run", "--resume", **{**data, "train.max_iter": 9})  # known by now


def test_a_fingerprint_depends_on_neither_order_nor_place():
    boxes = [
        {"bbox": [1, 2, 3, i], "bbox_mode": 1, "category_id": i, "iscrowd": 0} for i in range(3)
    ]
    images = [
        {"file_name": f"here/{i}.png", "height": 4, "width": 5 + i, "annotations": boxes}
        for i in range(3)
    ]
    MetadataCatalog.get("here").set(image_root="here")
    MetadataCatalog.get("there").set(image_root="there/x")
    other = [
        {**image, "file_name": image["file_name"].replace("here", "there/x"),
         "annotations": [{**box, "bbox": [*map(float, box["bbox"])]} for box in boxes[::-1]]}
        for image in images[::-1]
    ]
    one = fingerprint(images, OmegaConf.create({"names": "here"}))
    two = fingerprint(other, OmegaConf.create({"names": ["there"]}))
    assert one.shape == (3, 2) and not other_images(one, two)
    other[0]["width"] += 1
    del other[1]
    two = fingerprint(other, OmegaConf.create({"names": ["there"]}))
    assert other_images(one, two).startswith("1 missing, 1 with other")


@pytest.mark.parametrize("optimizer, part", [
    (torch.optim.AdamW, "without betas"), (torch.optim.SGD, "")
])
def test_the_state_of_another_optimizer_is_refused(optimizer, part):
    """Of a checkpoint that others wrote, without names."""
    weight = torch.nn.Parameter(torch.ones(2, 3))
    theirs = torch.optim.SGD([weight], 0.1, momentum=0.9)
    weight.sum().backward()
    theirs.step()
    ours = optimizer([torch.nn.Parameter(torch.ones(2, 3))], 0.1)
    assert part in other_parameters(theirs.state_dict(), [], ours, [["w"]])
    ours = optimizer([torch.nn.Parameter(torch.ones(2, 4))], 0.1)
    assert other_parameters(theirs.state_dict(), [], ours, [["w"]])


def test_a_living_run_keeps_its_folder(tmp_path, capfd, train):
    """Also from an evaluation of the same folder; a dead one does not."""
    holder = (
        "import sys; from projects.stageinteractor.engine.setup import sole_use\n"
        "with sole_use(sys.argv[1]): print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path], cwd=ROOT, stdin=subprocess.PIPE,
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
    with sole_use(tmp_path):
        pass
