"""Kill -9 at any moment, loss of power, a full disk: the last whole checkpoint is found."""

import contextlib
import multiprocessing
import os
import random
import sys
import time

import pytest
import torch
from detectron2.engine import hooks

from projects.stageinteractor.checkpoint import SafeCheckpointer
from projects.stageinteractor.checkpoint import weight_files as files
from projects.stageinteractor.engine.hooks import PeriodicCheckpointer
from projects.stageinteractor.errors import UserError
from support.disks import limited_files
from support.runs import CONFIG, ROOT, environment, overrides
from support.trainers import Scalar, make_trainer

STEPS = 40
RUN = {
    "train.max_iter": STEPS,
    "train.eval_period": 10,
    "train.checkpointer.period": 1,  # so that most moments are within a save
    "train.log_period": 5,
    "train.seed": 1,
    "train.model_ema.enabled": "true",
}


def run_command(arguments, log):
    """In a process of its own: the command, its output in a file."""
    os.chdir(ROOT)
    os.environ.update(environment())
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    import train_net

    train_net.main(train_net.parse_arguments(arguments))


@pytest.fixture(scope="module")
def begin(square_images):
    """Start the command in a process that has its modules imported already, or --resume it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["projects.stageinteractor.engine.resume"])

    def begin(folder):
        arguments = ["--config-file", CONFIG, "--resume", *overrides(square_images, folder, **RUN)]
        process = context.Process(target=run_command, args=(arguments, str(log_of(folder))))
        process.start()
        return process

    return begin


def log_of(folder):
    return folder.parent / f"{folder.name}.log"


def newest(folder):
    """The iteration in the names of periodic checkpoints, -1 if there is none."""
    return max((int(path.stem[6:]) for path in folder.glob("model_0*.pth")), default=-1)


def complete(process):
    process.join(300)
    assert process.exitcode == 0


def iteration_of(folder):
    """After the last checkpoint; all of them can be read, whatever has happened."""
    assert all(
        torch.load(path, weights_only=True)["iteration"] >= 0 for path in folder.glob("model_*.pth")
    )
    last = SafeCheckpointer(Scalar(), str(folder)).get_checkpoint_file()
    return torch.load(last, weights_only=True)["iteration"] if last else -1


def kill_often(begin, folder, kills, seed):
    """Kill the run at random moments, then let it end; the iterations after which it was killed."""
    moments, reached, log = random.Random(seed), [], log_of(folder)
    for _ in range(kills):
        size = log.stat().st_size if log.exists() else 0
        wanted = iteration_of(folder) + moments.randint(0, 2)
        process = begin(folder)
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError), open(log) as file:
                file.seek(size)
                if "Starting training" in file.read() and newest(folder) >= wanted:
                    break
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        reached.append(iteration_of(folder))
        assert reached[-1] >= wanted  # what had its name was found
    complete(begin(folder))
    return reached


def assert_killed_run_equals_whole_one(begin, folder, kills):
    whole, killed = folder / "whole", folder / "killed"
    complete(begin(whole))
    reached = kill_often(begin, killed, kills, seed=kills)
    assert reached == sorted(reached)  # nothing that was saved is lost again
    one, other = (
        torch.load(path / "model_final.pth", weights_only=True) for path in (whole, killed)
    )
    for part in ("model", "model_ema"):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), name
    assert len(list(killed.glob("model_0*"))) == 3 and not list(killed.glob("*.tmp"))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_like_a_whole_one(begin, tmp_path):
    assert_killed_run_equals_whole_one(begin, tmp_path, kills=4)


@pytest.mark.rare
def test_a_run_killed_a_hundred_times_ends_like_a_whole_one(begin, tmp_path, monkeypatch):
    monkeypatch.setitem(RUN, "train.max_iter", 500)
    assert_killed_run_equals_whole_one(begin, tmp_path, kills=100)


def save(folder, iteration, name=None):
    """A checkpoint of a run, as training saves it."""
    trainer = make_trainer([])
    trainer.iter = iteration
    torch.nn.init.constant_(trainer.model.weight, iteration)
    checkpointer = SafeCheckpointer(trainer.model, str(folder), trainer=trainer)
    checkpointer.save(name or f"model_{iteration:07d}", iteration=iteration)
    return folder / f"{name or f'model_{iteration:07d}'}.pth"


def last_of(folder):
    path = SafeCheckpointer(Scalar(), str(folder)).get_checkpoint_file()
    return os.path.basename(path)


def truncate(path, share=0.5):
    with open(path, "r+b") as file:
        file.truncate(int(path.stat().st_size * share))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_damaged_last_checkpoint_is_passed_over(tmp_path, share):
    for iteration in (9, 19, 29):
        path = save(tmp_path, iteration)
    truncate(path, share)
    assert last_of(tmp_path) == "model_0000019.pth"


@pytest.mark.parametrize("note", [None, "", "\0\0\0\0", "model_0000099.pth"])
def test_without_a_sound_note_the_last_one_is_found(tmp_path, note):
    for iteration in (29, 9, 19):
        save(tmp_path, iteration)
    path = tmp_path / "last_checkpoint"
    path.unlink() if note is None else path.write_text(note)
    assert last_of(tmp_path) == "model_0000029.pth"


def test_a_checkpoint_that_could_not_be_noted_any_more_is_found(tmp_path):
    save(tmp_path, 9)
    note = (tmp_path / "last_checkpoint").read_text()
    save(tmp_path, 19)
    (tmp_path / "last_checkpoint").write_text(note)
    os.utime(tmp_path / "last_checkpoint", ns=(0, (tmp_path / note).stat().st_mtime_ns + 1))
    assert last_of(tmp_path) == "model_0000019.pth"


def test_a_person_may_go_back_to_an_earlier_checkpoint(tmp_path):
    """By writing its name where Detectron2 notes the last one."""
    for iteration in (9, 19):
        save(tmp_path, iteration)
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth\n")
    assert last_of(tmp_path) == "model_0000009.pth"


def test_the_best_checkpoint_is_taken_where_it_is_the_last(tmp_path):
    save(tmp_path, 9)
    save(tmp_path, 14, "model_best")
    assert last_of(tmp_path) == "model_best.pth"
    (tmp_path / "last_checkpoint").unlink()
    assert last_of(tmp_path) == "model_best.pth"
    save(tmp_path, 19)
    assert last_of(tmp_path) == "model_0000019.pth"


@pytest.mark.parametrize("order", [(9, 19, 29), (29, 9, 19)])
def test_iterations_and_not_the_clock_order_checkpoints(tmp_path, order):
    """As after a copy of the folder, or a clock that was set back."""
    for iteration in (9, 19, 29):
        save(tmp_path, iteration)
    for moment, iteration in enumerate(order):
        os.utime(tmp_path / f"model_{iteration:07d}.pth", (moment, moment))
    checkpointer = SafeCheckpointer(Scalar(), str(tmp_path))
    names = [os.path.basename(path) for path in checkpointer.numbered_checkpoints()]
    assert names == [f"model_{iteration:07d}.pth" for iteration in (9, 19, 29)]
    for note in ("model_0000019.pth", "model_0000029.pth"):  # that of 29 may have been lost
        (tmp_path / "last_checkpoint").write_text(note)
        assert last_of(tmp_path) == "model_0000029.pth"


def test_a_run_that_went_back_keeps_its_own_checkpoints(tmp_path):
    """Those of the time before stay until they are written over."""
    for iteration in (0, 1, 5, 6):
        save(tmp_path, iteration)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth\n")
    trainer = make_trainer([[1.0]] * 2)
    checkpointer = SafeCheckpointer(trainer.model, str(tmp_path), trainer=trainer)
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 1, 2)])
    (tmp_path / "model_0000009.pth.tmp").write_bytes(b"half of it")
    (tmp_path / "mine.tmp").mkdir()
    trainer.train(2, 4)
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["mine.tmp"]
    assert [os.path.basename(path) for path in checkpointer.numbered_checkpoints()] == [
        f"model_000000{i}.pth" for i in (2, 3, 5, 6)
    ]


def test_weights_that_are_no_run_are_no_checkpoint_to_resume(tmp_path):
    torch.save({"model": {}}, tmp_path / "released.pth")
    assert not SafeCheckpointer(Scalar(), str(tmp_path)).has_checkpoint()
    assert last_of(tmp_path) == ""


def test_the_last_checkpoint_is_kept_whatever_the_clock_says(tmp_path):
    """Here it was set back, so that the newest file looks like the oldest."""
    trainer = make_trainer([[1.0]] * 4)
    checkpointer = SafeCheckpointer(trainer.model, str(tmp_path), trainer=trainer)
    found, save = [], checkpointer.save
    look = hooks.CallbackHook(after_step=lambda _: found.append(last_of(tmp_path)))
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 1, 1), look])

    def save_earlier(name, **options):
        save(name, **options)
        os.utime(tmp_path / f"{name}.pth", (10 - trainer.iter, 10 - trainer.iter))

    checkpointer.save = save_earlier
    trainer.train(0, 4)
    assert found == [*(f"model_000000{i}.pth" for i in range(3)), "model_final.pth"]


def test_a_folder_of_nothing_but_damaged_checkpoints_is_refused(tmp_path):
    truncate(save(tmp_path, 9))
    with pytest.raises(UserError, match="no checkpoint in .* can be read: start again with"):
        last_of(tmp_path)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """And its name before the save ends, so that a loss of power leaves the old or the new one."""
    calls = []

    def watch(name):
        original = getattr(os, name)

        def watched(*args):
            if name == "fsync":
                calls.append((name, os.path.basename(os.readlink(f"/proc/self/fd/{args[0]}"))))
            else:
                calls.append((name, os.path.basename(args[1])))
            return original(*args)

        monkeypatch.setattr(os, name, watched)

    if sys.platform != "linux":
        pytest.skip("file descriptors have names on Linux only")
    watch("fsync"), watch("replace")
    files.write_checkpoint({"a": 1}, str(tmp_path / "model.pth"))
    assert calls == [
        ("fsync", "model.pth.tmp"), ("replace", "model.pth"), ("fsync", tmp_path.name)
    ]


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, size):
    """Whether the file or only the note of it has no room."""
    before = save(tmp_path, 9).read_bytes()
    with limited_files(size), pytest.raises(UserError) as caught:
        save(tmp_path, 9)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"cannot save {tmp_path}/model_0000009.pth: File too large")
    assert second.endswith(f"go on from {tmp_path}/model_0000009.pth with --resume")
    assert (tmp_path / "model_0000009.pth").read_bytes() == before
    assert last_of(tmp_path) == "model_0000009.pth"
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000009.pth"]
