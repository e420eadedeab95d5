"""The whole model: gradients reach everything, batches mix, odd input works, configs build."""

import math

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.analysis import FlopCountAnalysis

from projects.stageinteractor.analysis.timing import Work, peak_memory
from projects.stageinteractor.data import coco_dataset
from projects.stageinteractor.modeling.fast_sampling.table import FeatureTable
from support.forms import KernelForm, needs_triton
from support.models import CONFIGS, ROOT, build, make_image, tiny_config, wake
from support.shapes import make_shapes

R50 = ROOT / "projects/stageinteractor/configs/stageinteractor_r50_12ep.py"










def test_every_parameter_gets_a_gradient():
    model = wake(build()).train()
    losses = model([make_image(96, 128), make_image(96, 96, objects=4)])
    sum(losses.values()).backward()
    without = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ]
    # The first boxes are all the same, so that the attention bias of stage 0 is constant and its
    # gradient a rounding error.
    assert set(without) <= {"decoder.stages.0.attention.iof_tau"}


def test_detectron2_counts_the_operations_of_a_batch():
    """It traces the model, so that sizes of images are tensors."""
    counted = FlopCountAnalysis(build().eval(), [make_image(64, 96), make_image(64, 64)])
    operations = counted.unsupported_ops_warnings(False).by_module()
    assert operations["model.decoder.stages.0"] > 0 and operations["model.backbone"] > 0


def test_checkpointed_stages_give_the_same_gradients_in_less_memory():
    model = wake(build()).train()
    decoder = model.decoder
    maps = [torch.randn(2, 16, 96 // stride, 128 // stride) for stride in decoder.strides]
    maps = [features.requires_grad_() for features in maps]
    content, xyzr = model.query_generator(torch.tensor([[96, 128], [96, 100]]))

    def run():
        outputs = decoder(content.detach(), xyzr, maps)
        (outputs.logits.square().mean() + outputs.xyzr.mean() + outputs.content.mean()).backward()

    work = Work(run, maps, list(decoder.parameters()))
    found, memory = [], []
    for decoder.checkpoint_stages in (False, True):
        work.reset()
        run()
        found.append([leaf.grad.clone() for leaf in (*work.leaves, *work.weights)])
        memory.append(peak_memory(work, "cpu"))
    torch.testing.assert_close(found[1], found[0])
    assert memory[1] < 0.8 * memory[0]


@pytest.mark.parametrize("backend, form", [
    # everything but the last step, which takes minutes
    pytest.param("aot_eager", FeatureTable.from_maps, marks=pytest.mark.slow),
    pytest.param("aot_eager", KernelForm, marks=[needs_triton, pytest.mark.rare]),
    pytest.param("inductor", FeatureTable.from_maps, marks=pytest.mark.rare),
])
def test_compiled_stages_give_the_same_results_and_gradients(backend, form, monkeypatch):
    """Also for another batch and image size, with the same names of weights."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compile_module(m, backend=backend))
    cfg = tiny_config()
    cfg.decoder.points_per_stage = [32, 32, 32]  # two kinds of stages, with and without reuse
    torch.manual_seed(0)
    model = wake(instantiate(cfg)).train()
    model.decoder.make_pyramid = form
    names = list(model.state_dict())
    batches = [make_image(64, 96)], [make_image(96, 64), make_image(32, 64, objects=1)]

    def results():
        found = []
        for batch in batches:
            model.zero_grad()
            losses = model(batch)
            sum(losses.values()).backward()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
            found.append({**losses, **gradients})
        with torch.no_grad():
            outputs = model.decode(model.preprocess(batches[0]))
        return [*found, outputs._asdict()]

    expected = results()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model.decoder.compile_stages()
    compiled = results()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert list(model.state_dict()) == names
    for values, others in zip(compiled, expected):
        for name, value in values.items():
            torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "images",
    [
        [make_image(64, 64, objects=0)],
        [make_image(97, 131, objects=0), make_image(33, 250, objects=3)],
        [make_image(1, 1, objects=0)],
        [make_image(75, 41, objects=1)],
        [make_image(64, 96, objects=30)],
    ],
    ids=["no objects", "mixed sizes", "one pixel", "one object", "more objects than queries"],
)
def test_any_image_trains_and_detects(images):
    model = wake(build())
    losses = model.train()(images)
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        outputs = model.eval()(images)
    for image, output in zip(images, outputs):
        found = output["instances"]
        assert found.image_size == tuple(image["image"].shape[1:])
        assert (found.scores.diff() <= 0).all()
        assert found.pred_boxes.tensor.min() >= 0 if len(found) else True
        assert ((found.pred_classes >= 0) & (found.pred_classes < 5)).all()


def test_detections_are_scaled_to_the_size_that_was_asked_for():
    model = wake(build()).eval()
    image = make_image(64, 96)
    with torch.no_grad():
        small = model([image])[0]["instances"]
        large = model([{**image, "height": 128, "width": 288}])[0]["instances"]
    assert large.image_size == (128, 288)
    scale = torch.tensor([3.0, 2, 3, 2])
    torch.testing.assert_close(
        large.pred_boxes.tensor, small.pred_boxes.tensor * scale, atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_detected(bad):
    """In a query, the others stay; in the image, nothing is left, and nothing crashes."""
    model = wake(build()).eval()
    logits, xyzr = torch.randn(1, 6, 5), torch.rand(1, 6, 4) * 5
    whole = model.detect(logits, xyzr, [(64, 64)])[0]
    xyzr[0, 2, 3], logits[0, 4] = bad, float("nan")
    found = model.detect(logits, xyzr, [(64, 64)])[0]
    assert len(whole) == 12 and len(found) > 0
    assert found.pred_boxes.tensor.isfinite().all() and found.scores.isfinite().all()
    image = make_image(64, 64)
    image["image"][:, :, 5] = bad
    with torch.no_grad():
        assert model([image])[0]["instances"].scores.isfinite().all()


def test_fewer_scores_than_detections_wanted():
    model = build()
    model.detections_per_image = 100
    found = model.detect(torch.randn(1, 6, 5), torch.rand(1, 6, 4), [(64, 64)])[0]
    assert len(found) == 30


def test_attention_bias_of_boxes_apart_and_alike():
    """tau * log(IoF + 1e-7): 0 for the same box, tau * log(1e-7) for boxes apart."""
    attention = build().decoder.stages[0].attention
    xyzr = torch.tensor([[[10.0, 10, 3, 0], [90, 90, 3, 0]]])
    bias = attention.bias(xyzr)[0]
    assert bias.shape == (8, 2, 2)
    torch.testing.assert_close(bias[:, 0, 1], attention.iof_tau * math.log(1e-7))
    torch.testing.assert_close(bias[:, 1, 1], torch.zeros(8), atol=1e-5, rtol=0)


def test_uint8_and_float_images_are_the_same():
    model = wake(build()).eval()
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        a, b = (model([{"image": i}])[0]["instances"].scores for i in (image, image.float()))
    torch.testing.assert_close(a, b)


def test_images_of_one_padded_size_do_not_see_each_other():
    """The same detections alone and in a batch."""
    model = wake(build()).eval()
    images = [make_image(90, 120), make_image(96, 128), make_image(70, 100)]
    with torch.no_grad():
        together = model(images)
        for image, output in zip(images, together):
            alone = model([image])[0]["instances"]
            torch.testing.assert_close(
                alone.pred_boxes.tensor, output["instances"].pred_boxes.tensor, atol=1e-3, rtol=0
            )
            torch.testing.assert_close(alone.scores, output["instances"].scores)


def test_padding_shows_because_the_backbone_and_the_shared_norm_see_it():
    """Released behaviour, documented in the project's README: more padding, other numbers."""
    model = wake(build()).eval()
    image = make_image(64, 64)
    with torch.no_grad():
        alone = model([image])[0]["instances"].scores
        padded = model([image, make_image(64, 160)])[0]["instances"].scores
    difference = (alone - padded).abs().max()
    assert 1e-6 < difference < 0.1


def test_frozen_parts_and_batch_norm_statistics_stay_in_training():
    cfg = tiny_config()
    cfg.backbone.frozen_modules = ["conv_stem", "bn1"]
    model = wake(instantiate(cfg)).train()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items() if "running" in k}
    sum(model([make_image(64, 64)]).values()).backward()
    after = model.backbone.state_dict()
    assert before and all(torch.equal(before[name], after[name]) for name in before)
    assert model.backbone.body.conv_stem.weight.grad is None
    assert model.backbone.body.bn1.weight.grad is None
    assert model.backbone.body.blocks[3][0].bn1.weight.grad is not None


def test_resnet_norms_train_their_affine_parameters_from_res3_on():
    model = instantiate(LazyConfig.load(str(R50)).model)
    names = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert "res3.0.conv1.norm.weight" in names
    assert not any(name.startswith(("stem", "res2")) for name in names)
    assert not any(module.training for module in model.train().backbone.res3.modules()
                   if isinstance(module, torch.nn.BatchNorm2d))


def test_images_without_objects_are_left_out_on_request(tmp_path):
    annotations = make_shapes(tmp_path, images=3, empty=True)
    files = {"json_file": str(annotations), "image_root": str(tmp_path / "images")}
    assert len(coco_dataset(**files)) == 3
    assert len(coco_dataset(**files, training=True)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_close_to_float32(dtype):
    model = wake(build()).train()
    images = [make_image(64, 96)]
    full = sum(model(images).values())
    with torch.autocast("cpu", dtype):
        mixed = sum(model(images).values())
    mixed.backward()
    assert mixed.item() == pytest.approx(full.item(), rel=0.05)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_instantiates(path):
    """Model, optimizer and schedule; data loaders need their data sets."""
    cfg = LazyConfig.load(str(path))
    with torch.device("meta"):
        cfg.model.backbone = None  # Detectron2's ResNet initialises in numpy
        model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    schedule = instantiate(cfg.lr_multiplier)
    assert optimizer.param_groups and schedule(0.5) > schedule(0.999) > 0
    assert cfg.train.device == "auto"
    assert cfg.dataloader.train.total_batch_size > 0
    assert path.read_text().startswith('"""') and "train_net.py" in path.read_text()
