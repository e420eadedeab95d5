"""The engine's parts by themselves: a trainer's step, the moving average, the best checkpoint."""

from operator import methodcaller

import pytest
import torch
from detectron2.utils.events import EventStorage, get_event_storage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from projects.stageinteractor.checkpoint import SafeCheckpointer
from projects.stageinteractor.engine.hooks import BestCheckpointer, ModelEMA
from projects.stageinteractor.engine.trainer import Trainer
from support.models import build, make_image
from support.trainers import Scalar, make_trainer


def after_one_step(batches, **options):
    trainer = make_trainer(batches, **options)
    trainer.train(0, 1)
    return trainer.model.weight.item()


def test_accumulated_batches_step_like_one_large_batch():
    whole = after_one_step([[1.0, 2.0, 3.0, 6.0]])
    trainer = make_trainer([[1.0, 2.0], [3.0, 6.0]], accumulation_steps=2)
    trainer.train(0, 1)
    assert trainer.model.weight.item() == pytest.approx(whole)
    assert whole == pytest.approx(1 - 0.1 * 3)
    assert trainer.storage.latest()["total_loss"][0] == pytest.approx(3)


def test_a_step_forgets_the_gradients_of_the_one_before():
    trainer = make_trainer([[1.0], [1.0]])
    trainer.train(0, 2)
    assert trainer.model.weight.item() == pytest.approx(0.8)


def test_gradients_are_clipped():
    clipped = after_one_step([[100.0]], clip_grad={"max_norm": 2.0, "norm_type": 2})
    assert clipped == pytest.approx(1 - 0.1 * 2, rel=1e-4)


def test_float16_scales_the_loss_and_keeps_tiny_gradients():
    assert after_one_step([[1e-6]], lr=1e5, amp_dtype=torch.float16) == pytest.approx(0.9, rel=1e-3)


def test_float16_clips_the_true_gradient_and_not_the_scaled_one():
    clip = {"max_norm": 2.0, "norm_type": 2}
    clipped = after_one_step([[1.0]], amp_dtype=torch.float16, clip_grad=clip)
    assert clipped == pytest.approx(0.9, rel=1e-3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_forward_pass_runs_in_the_precision_that_was_asked_for(dtype):
    trainer = make_trainer([[1.0]], amp_dtype=dtype)
    trainer.train(0, 1)
    assert trainer.model.dtype == dtype


def test_the_scale_of_float16_survives_a_resume():
    trainer = make_trainer([[float("inf")]], amp_dtype=torch.float16)
    trainer.grad_scaler.load_state_dict({**trainer.grad_scaler.state_dict(), "scale": 64.0})
    trainer.iter = 0
    other = make_trainer([[1.0]], amp_dtype=torch.float16)
    other.load_state_dict(trainer.state_dict())
    assert other.grad_scaler.state_dict()["scale"] == 64
    plain = make_trainer([[1.0]])
    plain.load_state_dict(trainer.state_dict())  # precision may change between runs


def test_what_a_model_records_is_averaged_over_a_step_and_is_no_loss():
    trainer = make_trainer([[1.0, 2.0], [3.0, 6.0]], accumulation_steps=2)

    def record(model, batch, losses):
        get_event_storage().put_scalar("doubled", losses["loss"] * 2)
        get_event_storage().put_scalar("on_the_host", 7)

    trainer.model.register_forward_hook(record)
    trainer.train(0, 1)
    figures = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert figures["doubled"] == pytest.approx(6)
    assert figures["on_the_host"] == 7
    assert figures["total_loss"] == pytest.approx(3)


class PretendedDevice(TorchDispatchMode):
    """Takes a model for one on another device, and notes what would make the host wait for it.

    A copy is there if it was sent there, and so is whatever is computed from what is there.
    """

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __init__(self, model, monkeypatch):
        super().__init__()
        self.storages, self.waits = {}, []
        self.hold(*model.parameters(), *model.buffers())
        for name in ("cpu", "tolist", "to"):
            monkeypatch.setattr(torch.Tensor, name, self.replace(getattr(torch.Tensor, name)))

    def hold(self, *tensors):
        storages = [tensor.untyped_storage() for tensor in tensors]
        self.storages |= {storage._cdata: storage for storage in storages}

    def holds(self, *tensors):
        return any(tensor.untyped_storage()._cdata in self.storages for tensor in tensors)

    def replace(self, method):
        """A method of tensors that copies between devices, which is nothing without them."""

        def replacement(tensor, *args, **kwargs):
            there = self.holds(tensor)
            if there and method.__name__ != "to":
                self.waits.append(method.__name__)
                tensor = torch.from_numpy(tensor.detach().numpy().copy())
            elif not there and args and isinstance(args[0], torch.device):
                tensor = tensor.clone()
                self.hold(tensor)
            return method(tensor, *args, **kwargs)

        return replacement

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        there = self.holds(*filter(torch.is_tensor, tree_leaves((args, kwargs))))
        name = function.overloadpacket.__name__
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if there and (masked or name in self.WAITS):
            self.waits.append(name)
        result = function(*args, **(kwargs or {}))
        if there:
            self.hold(*filter(torch.is_tensor, tree_leaves(result)))
        return result


@pytest.mark.parametrize(
    "read",
    [
        methodcaller("item"), methodcaller("tolist"), methodcaller("cpu"), methodcaller("nonzero"),
        bool, float, lambda x: x[x > 0], lambda x: int(torch.tensor([2]).to(torch.device("cpu"))),
    ],
)
def test_the_pretended_device_notes_what_reads_it(read, monkeypatch):
    model = Scalar()
    with PretendedDevice(model, monkeypatch) as device:
        (model.weight * 2).sum(0, keepdim=True).cpu().item()
        assert device.waits == ["cpu"]
        read(model.weight.detach() + 1)
    assert len(device.waits) == 2


def test_a_step_waits_for_the_device_twice(monkeypatch):
    """For the costs to match by, and for all figures together."""
    model = build().train()
    clip_grad = {"max_norm": 1.0, "norm_type": 2}
    batches = [[make_image(64, 96), make_image(64, 64, objects=3)]] * 2
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = Trainer(model, batches, optimizer, clip_grad=clip_grad)
    with PretendedDevice(model, monkeypatch) as device:
        trainer.train(0, 2)
    assert device.waits == ["cpu", "cpu"] * 2
    assert {"labels/kept", "labels/dropped", "labels/gained"} <= set(trainer.storage.latest())


def test_the_average_follows_its_formula():
    """It starts at the first weights it sees; then decay * average + (1 - decay) * weight."""
    model = Scalar()
    ema, expected = ModelEMA(model, 0.9), None
    for value in (3.0, 5.0, 4.0):
        torch.nn.init.constant_(model.weight, value)
        ema.after_step()
        expected = value if expected is None else 0.9 * expected + 0.1 * value
        assert ema.module.weight.item() == pytest.approx(expected)


def evaluate_and_save(folder, figures, resume_from=None):
    """A run whose evaluations give the figures; returns its hook."""
    trainer = make_trainer([[1.0]] * 10)
    checkpointer = SafeCheckpointer(trainer.model, str(folder), trainer=trainer)
    hook = BestCheckpointer(1, checkpointer, "bbox/AP")
    trainer.register_hooks([hook])
    if resume_from:
        checkpointer.resume_or_load("", resume=True)
    with EventStorage() as storage:
        trainer.storage = storage
        for iteration, figure in enumerate(figures):
            trainer.iter = storage.iter = iteration
            torch.nn.init.constant_(trainer.model.weight, figure)
            storage.put_scalar("bbox/AP", figure, smoothing_hint=False)
            hook._best_checking()
    return hook


def test_the_best_checkpoint_outlives_a_resume(tmp_path):
    evaluate_and_save(tmp_path, [10.0, 30.0, 20.0])
    hook = evaluate_and_save(tmp_path, [25.0], resume_from=True)
    assert hook.best_metric == 30
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert saved["model"]["weight"].item() == 30
    evaluate_and_save(tmp_path, [40.0, float("nan")], resume_from=True)
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert saved["model"]["weight"].item() == 40


def test_an_evaluation_without_a_number_is_never_the_best(tmp_path):
    """First, between others and last."""
    nan = float("nan")
    evaluate_and_save(tmp_path, [nan])
    assert not (tmp_path / "model_best.pth").exists()
    hook = evaluate_and_save(tmp_path, [nan, 30.0, nan, 20.0, nan])
    assert (hook.best_metric, hook.best_iter) == (30, 1)
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert saved["model"]["weight"].item() == 30


def test_numbers_of_long_runs_are_not_kept_for_ever():
    """Those of the last thousand steps are, for medians."""
    trainer = make_trainer([[1.0]] * 1010)
    trainer.train(0, 1010)
    for name, history in trainer.storage.histories().items():
        iterations = [iteration for _, iteration in history.values()]
        assert iterations == list(range(10, 1010)), name
