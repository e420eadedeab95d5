"""Numbers that are not finite and memory that runs out: nothing is spoilt, and somebody is told."""

import logging

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import HookBase, hooks, launch
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.utils.data import DataLoader

from projects.stageinteractor.data import begin_loading
from projects.stageinteractor.engine import failures
from projects.stageinteractor.engine.failures import (
    explain,
    explain_out_of_memory,
    report_failures,
)
from projects.stageinteractor.engine.processes import exit_at_once
from projects.stageinteractor.engine.trainer import Trainer
from projects.stageinteractor.errors import UserError
from support.models import build, make_image, wake
from support.trainers import Scalar, make_trainer

NAN, INF = float("nan"), float("inf")


def gradient_of(model, values):
    """Have the model's gradient multiplied by each of the values in turn."""
    remaining = iter(values)
    model.weight.register_hook(lambda gradient: gradient * next(remaining))


@pytest.fixture
def warnings(caplog):
    logger = logging.getLogger("detectron2.projects.stageinteractor.engine.trainer")
    logger.propagate = True
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_skips_the_step(value, warnings):
    trainer = make_trainer([[1.0], [value], [1.0]])
    trainer.train(0, 3)
    assert trainer.model.weight.item() == pytest.approx(0.8)  # two steps of 0.1
    assert (trainer.skipped_steps, trainer.skipped_in_a_row) == (1, 0)
    assert trainer.storage.latest()["skipped_steps"] == (1, 1)
    losses = trainer.storage.history("total_loss").values()
    assert [iteration for _, iteration in losses] == [0, 2]  # medians do not see it
    assert "iteration 2: the loss is not finite: step skipped, 1 in a row" in warnings.text


@pytest.mark.parametrize("clip_grad", [None, {"max_norm": 1.0, "norm_type": 2}])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_gradient_that_is_not_finite_skips_the_step(value, clip_grad, warnings):
    trainer = make_trainer([[1.0]] * 3, clip_grad=clip_grad)
    gradient_of(trainer.model, [1, value, 1])
    trainer.train(0, 3)
    assert trainer.model.weight.item() == pytest.approx(0.8)
    assert trainer.skipped_steps == 1
    assert "iteration 2: the gradient is not finite: step skipped" in warnings.text


def test_one_of_several_accumulated_batches_is_enough():
    trainer = make_trainer([[1.0], [NAN], [1.0], [1.0]], accumulation_steps=2)
    trainer.train(0, 2)
    assert trainer.model.weight.item() == pytest.approx(0.9)


def test_too_many_in_a_row_stop_the_run():
    batches = [[NAN], [NAN], [1.0], [NAN], [NAN], [NAN]]
    trainer = make_trainer(batches, max_skipped_steps=3)
    with pytest.raises(FloatingPointError, match="loss was not finite in 3 steps in a row, up to "):
        trainer.train(0, 6)
    assert trainer.iter == 5 and trainer.skipped_steps == 5
    assert trainer.model.weight.item() == pytest.approx(0.9)


def test_the_count_survives_a_resume():
    trainer = make_trainer([[1.0], [NAN]])
    trainer.train(0, 2)
    other = make_trainer([])
    other.load_state_dict(trainer.state_dict())
    assert (other.skipped_steps, other.skipped_in_a_row) == (1, 1)


def test_an_overflow_of_float16_is_the_scalers_until_its_scale_is_spent():
    """It halves its scale down to where overflow is no matter of scale."""
    options = {"amp_dtype": torch.float16, "max_skipped_steps": 2}
    trainer = make_trainer([[1.0]] * 40, **options)
    gradient_of(trainer.model, [INF] * 40)
    with pytest.raises(FloatingPointError, match="gradient was not finite in 2 steps"):
        trainer.train(0, 40)
    assert trainer.iter == 17  # from a scale of 2 ** 16 down to 1, then two steps
    assert trainer.model.weight.item() == 1


def detector_trainer(batches, **options):
    model = wake(build()).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    return Trainer(model, batches, optimizer, **options)


def named(name, **options):
    return {**make_image(64, 64, **options), "file_name": name}


def test_the_images_of_a_skipped_step_are_named(warnings):
    good, pixels, boxes = (named(f"{name}.png") for name in ("good", "pixels", "boxes"))
    pixels["image"] = pixels["image"].float()
    pixels["image"][0, 0, 0] = NAN
    boxes["instances"].gt_boxes.tensor[0, 2] = INF
    trainer = detector_trainer([[good, pixels], [boxes] * 9, [good, good]])
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train(0, 2)
    messages = [record.getMessage() for record in warnings.records]
    assert [message.rpartition("images: ")[2] for message in messages] == [
        "good.png, pixels.png", ", ".join(["boxes.png"] * 8 + ["..."])
    ]
    assert all(map(torch.equal, before, trainer.model.parameters()))


@pytest.mark.parametrize("value", [NAN, INF])
def test_predictions_that_are_not_finite_are_matched_and_skipped(value, monkeypatch):
    """SciPy's solver refuses such costs, so that what it is given is looked at."""
    from projects.stageinteractor.modeling import matcher

    seen, solve = [], matcher.linear_sum_assignment

    def watched(cost):
        seen.append(cost)
        return solve(cost)

    monkeypatch.setattr(matcher, "linear_sum_assignment", watched)
    trainer = detector_trainer([[named("a.png"), named("b.png")]] * 2)
    torch.nn.init.constant_(trainer.model.decoder.stages[0].box_head[3].bias, value)
    trainer.train(0, 1)
    assert trainer.skipped_steps == 1
    assert seen and all(torch.from_numpy(cost).isfinite().all() for cost in seen)


class FaultyScalar(Scalar):
    """Its loss or gradient is not finite in one process, in its second step."""

    def __init__(self, what):
        super().__init__()
        self.what, self.step = what, 0

    def forward(self, batch):
        self.step += 1
        is_faulty = self.step == 2 and comm.get_rank() == 1
        loss = (self.weight * torch.tensor([image["value"] for image in batch])).mean()
        if is_faulty and self.what == "loss":
            loss = loss + NAN
        elif is_faulty and self.what == "value only":  # finite gradient
            loss = loss + torch.tensor(INF)
        elif is_faulty:
            loss = loss + (self.weight - self.weight.detach()).sqrt().sum()
        return {"loss": loss}


@exit_at_once()
def train_with_a_fault(what, path):
    """Run in each process."""
    torch.set_num_threads(1)
    batches = [[{"file_name": f"{comm.get_rank()}-{i}.png", "value": 1.0}] for i in range(3)]
    model = create_ddp_model(FaultyScalar(what), device_ids=None)
    trainer = Trainer(model, batches, torch.optim.SGD(model.parameters(), 0.1))
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("detectron2.projects.stageinteractor.engine.trainer").addHandler(handler)
    trainer.train(0, 3)
    result = {
        "weight": model.module.weight.item(), "skipped": trainer.skipped_steps, "messages": messages
    }
    results = comm.gather(result)
    if comm.is_main_process():
        torch.save(results, path)


@pytest.mark.parametrize("what", ["loss", "value only", "gradient"])
def test_a_fault_in_one_process_skips_the_step_in_all(what, tmp_path):
    launch(train_with_a_fault, 2, dist_url="auto", args=(what, tmp_path / "results.pth"))
    for result in torch.load(tmp_path / "results.pth", weights_only=True):
        assert result["weight"] == pytest.approx(0.8)
        assert result["skipped"] == 1
        (message,) = result["messages"]
        images = ["0-1.png", "1-1.png"] if what == "gradient" else ["1-1.png"]
        assert message.endswith(f"images: {', '.join(images)}")


def run_step(trainer):
    with EventStorage() as trainer.storage:
        trainer.run_step()


def test_a_cpu_without_memory_says_what_helps():
    """The allocator is asked for more than there can be."""
    trainer = detector_trainer([[named("a.png"), named("b.png")]])
    trainer.model.backbone.register_forward_hook(lambda *_: torch.empty(2**60))
    with pytest.raises(UserError) as caught:
        run_step(trainer)
    first, second = str(caught.value).splitlines()
    assert first.startswith("out of memory with 2 images a process, padded to 64 x 64 pixels: ")
    for key in ("total_batch_size", "accumulation_steps", "checkpoint_stages", "amp", "max_size"):
        assert key in second


def test_a_gpu_without_memory_says_so_in_training_and_evaluation():
    batch = [named("a.png"), named("b.png")]
    for is_training, key in ((True, "train.accumulation_steps"), (False, "test.batch_size")):
        with pytest.raises(UserError, match=key):
            with explain_out_of_memory(batch, is_training):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes do not match"):
        with explain_out_of_memory([], is_training=True):
            raise RuntimeError("shapes do not match")


HOOKS = ("before_train", "before_step", "after_backward", "after_step", "after_train")


@pytest.mark.parametrize("values, steps", [([1.0, 2.0, 3.0, 6.0], 2), ([1.0, NAN, 1.0, 1.0], 2)])
def test_hooks_are_called_as_detectron2_promises(values, steps):
    """Once a step, of several batches, also where it is skipped."""
    trainer = make_trainer([[value] for value in values], accumulation_steps=2)
    calls, gradients = [], []
    hook = HookBase()
    for name in HOOKS:
        setattr(hook, name, lambda name=name: calls.append(name))

    def after_backward():
        calls.append("after_backward")
        gradients.append(trainer.model.weight.grad.item())

    hook.after_backward = after_backward
    trainer.register_hooks([hook])
    trainer.train(0, steps)
    assert calls == ["before_train", *HOOKS[1:4] * steps, "after_train"]
    assert gradients[1] == pytest.approx(sum(values[2:]) / 2)


@pytest.mark.parametrize("error", [
    TypeError("gloo"), AttributeError("nccl"), NotImplementedError("connection reset"),
    KeyError("x"), RuntimeError("DataLoader timed out after 5 seconds"), RuntimeError("bad shape"),
    FileNotFoundError(2, "No such file"), ZeroDivisionError(),
])
def test_an_unexpected_error_keeps_its_traceback(error, monkeypatch):
    """Also in one of several processes, and whatever its text."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    assert not explain(error)
    with pytest.raises(type(error)), report_failures():
        raise error


@pytest.mark.parametrize("error, part", [
    (UserError("no file x"), "no file x"),
    (FloatingPointError("not finite"), "optimizer.lr"),
    (OSError(28, "No space left on device"), "No space left"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer"), "--timeout"),
    (dist.DistBackendError("NCCL error"), "--timeout"),
])
def test_an_expected_error_has_one_only_where_that_is_asked_for(error, part, monkeypatch, capfd):
    """And in log.txt, where it does not come from a mistake of the user."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    logged = []
    monkeypatch.setattr(failures.LOGGER, "debug", lambda text, exc_info: logged.append(text))
    with pytest.raises(SystemExit) as ended, report_failures():
        raise error
    assert ended.value.code == 1
    said = capfd.readouterr().err
    assert said.startswith("error: ") and part in said and "Traceback" not in said
    assert len(logged) == (not isinstance(error, (UserError, OSError)))
    monkeypatch.setenv("STAGEINTERACTOR_TRACEBACK", "1")
    with pytest.raises(type(error)), report_failures():
        raise error


def test_a_full_shared_memory_is_told_by_what_helps():
    """Whatever cannot be sent by a process that loads data ends the main one's waiting."""
    loader = DataLoader(
        [0], num_workers=1, collate_fn=lambda _: Unsendable(), worker_init_fn=begin_loading,
        timeout=60,
    )
    with pytest.raises(RuntimeError, match="No space left on device") as caught:
        next(iter(loader))
    said = explain(caught.value)
    for part in ("/dev/shm", "docker run --shm-size=8g", "dataloader.train.num_workers=0"):
        assert part in said
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is")
    assert explain(killed) == said
    assert not explain(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."))


class Unsendable:
    """Fails as a tensor does when it is moved into shared memory that is full."""

    def __reduce__(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: "
            "No space left on device (28)"
        )


def test_a_stop_is_agreed_on_after_the_step():
    trainer = make_trainer([[1.0]] * 2)
    seen = []
    stop = hooks.CallbackHook(after_step=lambda _: seen.append(trainer.is_stopping))
    trainer.register_hooks([stop])
    trainer.model.register_forward_hook(
        lambda *_: setattr(trainer, "stop_requested", trainer.iter == 1)
    )
    trainer.train(0, 2)
    assert seen == [False, True]
    assert trainer.model.weight.item() == pytest.approx(0.8)  # that step is not lost
