"""Training, inference and evaluation on a GPU that is not there: what would fail or wait on one."""

from operator import methodcaller

import pytest
import torch
from detectron2.data import MetadataCatalog

from projects.stageinteractor.engine.evaluator import COCOEvaluator
from projects.stageinteractor.engine.trainer import Trainer
from projects.stageinteractor.modeling.fast_sampling import choice
from projects.stageinteractor.modeling.sampling import FeatureMaps
from support.forms import needs_triton
from support.models import build, make_image
from support.pretended_gpu import HostWaits, PretendedGPU, backward
from support.shapes import CLASSES, make_shapes

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this torch was built without CUDA"
)
MATCHING, FIGURES = "matcher.py:forward", "trainer.py:run_step"
RESULTS = "stageinteractor.py:detect", "postprocessing.py:detector_postprocess"


@pytest.fixture(autouse=True)
def no_driver(monkeypatch):
    """Autograd, autocast and the kernel ask the driver, which is not there."""
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(choice, "working_kernel", lambda device: None)


def use_kernel(monkeypatch):
    from projects.stageinteractor.modeling.fast_sampling import kernel

    monkeypatch.setattr(kernel, "launch", lambda *_: None)
    monkeypatch.setattr(choice, "working_kernel", lambda device: kernel.KernelTable)


def train_one_step(gpu, amp_dtype=None):
    model = gpu.place(build().train())
    batches = [[make_image(64, 96), make_image(64, 64, objects=3)]]
    with gpu:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        trainer = Trainer(
            model, batches, optimizer, amp_dtype=amp_dtype,
            clip_grad={"max_norm": 1.0, "norm_type": 2},
        )
        trainer.train(0, 1)
    return model


@needs_triton
@pytest.mark.parametrize("amp_dtype", [
    torch.bfloat16, pytest.param(None, marks=pytest.mark.slow),
])
def test_a_training_step_waits_for_the_costs_and_the_figures(amp_dtype, monkeypatch):
    """And nowhere else; every parameter gets a gradient there."""
    use_kernel(monkeypatch)
    gpu = PretendedGPU(MATCHING, FIGURES)
    model = train_one_step(gpu, amp_dtype)
    assert gpu.waits == [MATCHING, FIGURES]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.device.type == "cuda", name
            assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, torch.float32)


@pytest.mark.parametrize("allowed", [MATCHING, FIGURES])
def test_neither_wait_goes_unnoticed(allowed):
    with pytest.raises(HostWaits):
        train_one_step(PretendedGPU(allowed))


@torch.no_grad()
def test_inference_and_evaluation_wait_only_for_the_results(tmp_path):
    """Not before the last stage has been given to the device."""
    metadata = MetadataCatalog.get(str(tmp_path))
    metadata.set(json_file=str(make_shapes(tmp_path, images=1)), thing_classes=list(CLASSES))
    evaluator = COCOEvaluator(str(tmp_path), distributed=False)
    gpu = PretendedGPU(*RESULTS, "coco_evaluation.py:process")
    model = gpu.place(build().eval())
    images = [{**make_image(64, 96), "image_id": 1, "height": 128, "width": 192}]
    with gpu:
        evaluator.reset()
        found = model(images)
        assert set(gpu.waits) == set(RESULTS)
        assert found[0]["instances"].pred_boxes.device.type == "cuda"
        evaluator.process(images, found)
    assert set(gpu.waits) == {*RESULTS, "coco_evaluation.py:process"}
    detections = evaluator._predictions[0]["instances"]
    assert len(detections) == len(found[0]["instances"]) > 0


PLANTED = {
    "item": (methodcaller("item"), HostWaits),
    "tolist": (methodcaller("tolist"), HostWaits),
    "cpu": (methodcaller("cpu"), HostWaits),
    "a mask": (lambda x: x[None][x[None] > 0], HostWaits),
    "nonzero": (methodcaller("nonzero"), HostWaits),
    "a list to the device": (lambda x: x.new_tensor([1.0, 2.0]), HostWaits),
    "a tensor of the CPU": (lambda x: x + torch.ones(2), AssertionError),
    "another precision": (lambda x: x.half().view(1, 1) @ x.view(1, 1), AssertionError),
}


@pytest.mark.parametrize("mistake, error", PLANTED.values(), ids=PLANTED)
def test_mistakes_in_the_model_are_found(mistake, error, monkeypatch):
    original = FeatureMaps.sample

    def sample(self, points):
        mistake(points.flatten()[0].detach())
        return original(self, points)

    monkeypatch.setattr(FeatureMaps, "sample", sample)
    gpu = PretendedGPU()
    model = gpu.place(build().eval())
    with pytest.raises(error), gpu, torch.no_grad():
        model([make_image(64, 64)])
