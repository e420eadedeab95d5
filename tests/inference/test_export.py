"""Promises of exported files: they find what the model finds, in pictures of any size."""

import ctypes
import functools
import gc
import io
import json
import logging
import math
import sys
import types

import export
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from torch.torch_version import TorchVersion

from projects.stageinteractor.checkpoint import SafeCheckpointer
from projects.stageinteractor.config.portable_config import parse_portable, portable_config
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference import load_detector
from projects.stageinteractor.inference import opening as loading
from projects.stageinteractor.inference.export import exported_model as exported_module
from projects.stageinteractor.inference.export import writers
from projects.stageinteractor.inference.export.agreement import Agreement, compare
from projects.stageinteractor.inference.export.exported_model import ExportedModel
from projects.stageinteractor.inference.export.graph import DetectionGraph, FixedSameConv2d
from projects.stageinteractor.modeling.ablations import StageInteractorWithNMS
from support.exports import SIZES, assert_agreement, found, photographs
from support.golden_figures import CONFIGS
from support.models import build, wake
from support.portable_files import CLASSES, changed, small
from support.runtimes import unreadable


def confident(model):
    """Random weights whose scores are well above those that do not count."""
    for stage in wake(model).decoder.stages:
        nn.init.constant_(stage.class_head[-1].bias, -1.0)
    return model.eval()








# ---- the graph itself


def as_instances(size, boxes, scores, classes):
    """Outputs for one image."""
    return Instances(
        tuple(size), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes
    )


def batch_of(pictures):
    """Graph's inputs, with noise where an image is padded, and its outputs three times as large."""
    images = [torch.from_numpy(np.asarray(picture).transpose(2, 0, 1)) for picture in pictures]
    sizes = torch.tensor([image.shape[1:] for image in images])
    height, width = ((sizes.amax(0) + 31) // 32 * 32).tolist()
    padded = torch.randint(0, 256, (len(images), 3, height, width), dtype=torch.uint8)
    for place, image in zip(padded, images):
        place[:, : image.shape[1], : image.shape[2]] = image
    return images, (padded, sizes, 3 * sizes)


@torch.no_grad()
def test_the_graph_is_the_model():
    """In batches of mixed sizes, whatever is beyond an image."""
    model = confident(build())
    images, inputs = batch_of(photographs([(96, 130), (101, 70), (33, 128)]))
    expected = model([
        {"image": image, "height": 3 * image.shape[1], "width": 3 * image.shape[2]}
        for image in images
    ])
    boxes, scores, classes = DetectionGraph(model)(*inputs)
    for place, output in enumerate(expected):
        instances = output["instances"]
        found = as_instances(instances.image_size, boxes[place], scores[place], classes[place])
        result = compare(instances, found)
        assert result.holds and result.pairs > 10, result


@torch.no_grad()
def test_boxes_that_do_not_count_have_no_score():
    model = confident(build())
    graph, (_, inputs) = DetectionGraph(model), batch_of(photographs([(64, 96)]))
    decode = model.decode_padded

    def spoilt(*args):
        outputs = decode(*args)
        outputs.xyzr[-1, 0, :4] = torch.tensor([  # x, y, z and r of three queries, and one as it is
            [1e6, 5, 3, 0], [float("nan"), 5, 3, 0], [5, 5, float("inf"), 0], [30, 30, 4, 0]
        ])
        outputs.logits[-1, 0, :4] = 9.0
        return outputs

    model.decode_padded = spoilt
    boxes, scores, _ = graph(*inputs)
    num_classes = 5
    assert (scores[0] > 0.99).sum() == num_classes  # those of the fourth
    assert torch.isfinite(boxes[scores > 0]).all()
    (found,) = ExportedModel(graph, 32)([{"image": inputs[0][0, :, :64, :96]}])
    assert (found["instances"].scores > 0.99).sum() == num_classes


@torch.no_grad()
def test_half_precision_keeps_positions_and_scores_whole():
    model, pictures = confident(build()), photographs([(96, 130)])
    _, inputs = batch_of(pictures)
    whole = DetectionGraph(model)(*inputs)
    graph = DetectionGraph(confident(build()), half=True)
    half = graph(*inputs)
    assert half[0].dtype == half[1].dtype == torch.float32
    linear = [m for m in graph.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert {m.weight.dtype for m in linear} == {torch.float16}
    assert (half[1] - whole[1]).abs().max() < 0.02
    assert 1e-6 < (half[1] - whole[1]).abs().max()


@pytest.mark.parametrize("kernel, stride, dilation", [(3, 2, 1), (5, 2, 1), (3, 1, 2), (1, 2, 1)])
def test_fixed_padding_is_the_same_padding(kernel, stride, dilation):
    layer = Conv2dSame(4, 6, kernel, stride, dilation=dilation)
    fixed = FixedSameConv2d(4, 6, kernel, stride, dilation=dilation)
    fixed.load_state_dict(layer.state_dict())
    for size in ((8, 12), (32, 2)):
        x = torch.randn(2, 4, *size)
        assert torch.equal(layer(x), fixed(x))


# ---- what cannot be exported


def refused(*arguments):
    with pytest.raises(SystemExit) as caught:
        export.main([*map(str, arguments)])
    return str(caught.value)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model as training leaves it, whose test images keep their size."""
    folder, cfg = tmp_path_factory.mktemp("checkpoint"), small()
    cfg.dataloader.test.mapper.augmentations = []
    text = portable_config(cfg, CLASSES)
    torch.manual_seed(0)
    model = confident(instantiate(cfg.model))
    names = [item["name"] for item in CLASSES]
    SafeCheckpointer(model, str(folder), class_names=names, config=text).save("model")
    return str(folder / "model.pth")


def empty_file(folder, name):
    (folder / name).touch()
    return folder / name


def test_mistakes_are_named(checkpoint, tmp_path):
    common = ("--format", "onnx", "--output", tmp_path / "out")
    assert "give --checkpoint FILE, --config-file FILE or both" in refused(*common)
    assert "no checkpoint none.pth" in refused(*common, "--checkpoint", "none.pth")
    arguments = (*common, "--checkpoint", checkpoint)
    assert "--threshold 2: scores are between 0 and 1" in refused(*arguments, "--threshold", 2)
    assert "no picture none.jpg" in refused(*arguments, "--check", "none.jpg")
    assert "no picture a=b: overrides come" in refused(*arguments, "--check", "a=b")
    text = tmp_path / "a.txt"
    text.write_text("no picture")
    assert "a.txt: not an image in one of the formats" in refused(*arguments, "--check", text)
    assert "unknown config key" in refused(*arguments, "model.x=1")
    assert "is exported already" in refused(*common, "--checkpoint", empty_file(tmp_path, "a.onnx"))
    message = refused(*arguments, "model.size_divisibility=16")
    assert "model.size_divisibility=16 cannot be exported: it has to be a multiple of 32" in message
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.onnx").write_text("mine")
    assert "holds model.onnx already" in refused(*arguments)
    assert (tmp_path / "out/model.onnx").read_text() == "mine"


def test_other_models_are_refused(tmp_path):
    config = CONFIGS / "retinanet_lite0_bccd.py"
    message = refused("--config-file", config, "--format", "torch", "--output", tmp_path)
    assert "RetinaNet cannot be exported" in message
    cfg = small().model
    cfg._target_ = StageInteractorWithNMS
    with pytest.raises(UserError, match="StageInteractorWithNMS cannot be exported"):
        DetectionGraph(instantiate(cfg))


def test_missing_libraries_are_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(export, "trace", lambda graph: None)
    message = refused("--checkpoint", checkpoint, "--format", "onnx", "--output", tmp_path)
    assert message == "error: ONNX needs onnxscript: pip install -e '.[export]'"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "a.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="needs onnxruntime: pip install"):
        load_detector(tmp_path / "a.onnx")


# ---- files of others


def foreign_onnx(**metadata):
    """A model that is none of ours."""
    tensor = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "g", [tensor], [output])
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9
    )
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


@pytest.mark.parametrize("name, content, message", [
    ("a.onnx", b"no model", "onnxruntime cannot run .*a.onnx"),
    ("a.onnx", foreign_onnx(), "a.onnx was not written by tools/export.py"),
    ("a.onnx", foreign_onnx(config="{"), "a.onnx was not written by tools/export.py"),
    ("a.pt2", b"no program", "trusted=True"),
])
def test_a_file_that_is_none_of_ours_is_told(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_detector(tmp_path / name)


def test_numbers_in_other_files_are_refused(tmp_path):
    model = onnx.load_from_string(foreign_onnx())
    tensor = model.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="a.onnx keeps weights in other files"):
        load_detector(tmp_path / "a.onnx")


def description(**changes):
    """Metadata of an exported file, some of it changed."""
    return {
        "config": portable_config(small(), CLASSES), "size_divisibility": "32",
        "class_names": json.dumps([item["name"] for item in CLASSES]),
        "categories": json.dumps(CLASSES), **changes,
    }




@pytest.mark.parametrize("changes, run, message", [
    ({"class_names": '["cat"]'}, found, "other classes"),
    ({"categories": json.dumps(CLASSES[::-1])}, found, "other classes"),
    ({"config": changed("model.decoder.num_classes", 3)}, found, "3 classes and the names of 2"),
    ({"size_divisibility": "16"}, found, "size_divisibility is 16 and 32"),
    ({}, functools.partial(found, last_class=2), "finds class 2 and has the names of 2"),
    ({}, functools.partial(found, dtype=torch.int32), "outputs are not boxes"),
    ({}, lambda *_: found()[:2], "outputs are not boxes"),
    ({}, lambda *_: found()[::-1], "outputs are not boxes"),
])
def test_an_exported_file_has_to_agree_with_itself(tmp_path, monkeypatch, changes, run, message):
    monkeypatch.setattr(exported_module, "load_onnx", lambda _: (run, description(**changes)))
    with pytest.raises(UserError, match=f"(?s)a.onnx does not agree.*{message}.*Export it anew"):
        load_detector(empty_file(tmp_path, "a.onnx"))


def test_an_exported_file_that_agrees_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(exported_module, "load_onnx", lambda _: (found, description()))
    assert load_detector(empty_file(tmp_path, "a.onnx")).categories == CLASSES
    later = ExportedModel(functools.partial(found, last_class=7), 32, 2)
    with pytest.raises(UserError, match="finds class 7 and has the names of 2"):
        later([{"image": torch.zeros(3, 32, 32, dtype=torch.uint8)}])


def test_an_exported_config_of_another_version_is_told(tmp_path, monkeypatch):
    part = {"_target_": "detectron2.data.transforms.Resize", "size": 1}
    cfg = parse_portable(changed("preprocessing.augmentations", [part]), "a.onnx").cfg
    monkeypatch.setattr(loading, "load_exported", lambda *args, **options: (None, cfg, []))
    with pytest.raises(UserError, match="(?s)a.onnx, of another version perhaps: .*Export it anew"):
        load_detector(empty_file(tmp_path, "a.onnx"))


def test_a_program_is_loaded_by_those_who_trust_it(tmp_path):
    (tmp_path / "a.pt2").write_bytes(b"no program")
    with pytest.raises(UserError, match="torch cannot load .*a.pt2"):
        load_detector(tmp_path / "a.pt2", trusted=True)

    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    file = io.BytesIO()
    torch.export.save(torch.export.export(Double(), (torch.ones(1),)), file)
    (tmp_path / "a.pt2").write_bytes(file.getvalue())
    with pytest.raises(UserError, match="a.pt2 was not written by tools/export.py"):
        load_detector(tmp_path / "a.pt2", trusted=True)


# ---- whole files


def test_an_old_torch_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cpu"))
    message = refused("--checkpoint", checkpoint, "--format", "torch", "--output", tmp_path / "out")
    assert message == "error: torch 2.9.1+cpu cannot export a model: 2.11 or newer can"


@pytest.fixture(scope="module")
def all_formats(checkpoint, tmp_path_factory):
    """The small model as ONNX, and what OpenVINO and torch make of the same program."""
    folder = tmp_path_factory.mktemp("formats")
    model = load_detector(checkpoint, overrides=["train.device=cpu"]).model
    program = writers.trace(DetectionGraph(model))
    with pytest.MonkeyPatch.context() as patch:
        found = writers.onnx_files(program, description())
        patch.setattr(writers, "onnx_files", lambda *_: {"model.onnx": found["model.onnx"]})
        found |= writers.openvino_files(program, description())
    for name, content in (found | writers.program_files(program, description())).items():
        (folder / name).write_bytes(content)
    return folder


def test_an_onnx_model_is_read_alike_by_every_runtime(all_formats):
    """By the lists that they publish, of every node."""
    model = onnx.load(all_formats / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert not unreadable(model)
    assert not any(node.metadata_props for node in model.graph.node)
    sampling = next(node for node in model.graph.node if node.op_type == "GridSample")
    next(item for item in sampling.attribute if item.name == "mode").s = b"linear"
    model.graph.node.add(op_type="Unknown")
    assert [line[:26] for line in unreadable(model)] == [
        " Unknown is not in the list"[:26], "TensorRT reads GridSample "
    ]


@torch.no_grad()
def test_every_format_takes_images_of_any_size(checkpoint, all_formats):
    """Without padding them before, one or several; and pictures through the detector."""
    model = load_detector(checkpoint, overrides=["train.device=cpu"])
    pictures = photographs([(427, 640), (250, 310), (101, 77), (33, 200)])
    files = [all_formats / name for name in ("model.onnx", "model.xml", "model.pt2")]
    runs = [load_detector(file, trusted=True).model.run for file in files]
    for picture in pictures:
        image = torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())
        size = torch.tensor([image.shape[1:]] * 2)
        images = torch.stack([image, image.flip(2)])
        expected = model.model([{"image": one} for one in images])
        for file, run in zip(files, runs):
            for one, *outputs in zip(expected, *run(images, size, 1 * size)):
                assert compare(one["instances"], as_instances(size[0], *outputs)).holds, file
    with pytest.raises(UserError, match="takes images from 64 x 64 pixels on, padded: .* 32 x 224"):
        load_detector(files[-1], trusted=True).model([{"image": images[0][:, :32]}])
    with pytest.raises(AssertionError, match=">= 33"):
        torch.export.load(files[-1]).module()(images[..., :32, :], size, 1 * size)


def test_linear_layers_in_int8(checkpoint, all_formats, tmp_path, monkeypatch):
    """By the real command, which gets the program from elsewhere; differences are no error."""
    whole = onnx.load(all_formats / "model.onnx")
    del whole.metadata_props[:]
    written = types.SimpleNamespace(model_proto=whole)
    monkeypatch.setattr(export, "trace", lambda graph: None)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **options: written)
    (photo,) = photographs([(200, 300)])
    photo.save(tmp_path / "photo.png")
    monkeypatch.setattr(export, "compare", lambda *_: Agreement(1, 9, 9, 0.1))
    export.main(["--checkpoint", checkpoint, "--format", "onnx", "--output", str(tmp_path),
                 "--int8", "--check", str(tmp_path / "photo.png")])
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 19)]
    assert {"precision": "int8"}.items() <= {p.key: p.value for p in model.metadata_props}.items()
    sizes = {item.name: math.prod(item.dims) for item in whole.graph.initializer}
    linear = [node.input[1] for node in whole.graph.node
              if node.op_type in ("MatMul", "Gemm") and node.input[1] in sizes]
    in_int8 = [item for item in model.graph.initializer if item.data_type == onnx.TensorProto.INT8]
    assert len(linear) > 30
    saved = sum(sizes[name] for name in linear)  # and each column has a zero, of a byte
    assert saved <= sum(math.prod(item.dims) for item in in_int8) < 1.2 * saved
    assert not {item.name for item in model.graph.initializer} & {*linear}
    theirs, ours = (
        {item.name: onnx.numpy_helper.to_array(item) for item in each.graph.initializer}
        for each in (whole, model)
    )
    columns = []  # of each layer's weights, and the step to which each column is rounded
    for name in ours:
        if (stem := name.removesuffix("_quantized")) != name:
            scale, zero = ours[f"{stem}_scale"], ours[f"{stem}_zero_point"].astype(float)
            columns.append(((ours[name] - zero) * scale, scale))
    for name in linear:
        weight = theirs[name]
        assert any(
            found.shape == given.shape and (np.abs(found - given) <= 0.501 * scale).all()
            for found, scale in columns for given in (weight, weight.T)
        ), name
    for output in load_detector(tmp_path / "model.onnx")(photographs(SIZES[:3])):
        assert len(output) > 5 and output.scores.isfinite().all()
    assert not logging.root.manager.disable


def test_int8_is_for_onnx(checkpoint, tmp_path):
    common = "--checkpoint", checkpoint, "--output", tmp_path / "out", "--int8", "--format"
    for form in ("openvino", "torch"):
        assert f"--int8 is for --format onnx, not {form}" in refused(*common, form)
    with pytest.raises(SystemExit, match="2"):
        export.main([*map(str, common), "onnx", "--half"])


@torch.no_grad()
def test_every_runtime_that_is_installed_is_compared(all_formats):
    runs = dict(exported_module.each_runtime(str(all_formats / "model.onnx")))
    assert list(runs) == [
        "onnxruntime on the CPU", "onnxruntime on CUDA", "TensorRT", "DirectML", "OpenVINO"
    ]
    assert runs["onnxruntime on the CPU"] and runs["OpenVINO"]
    available = onnxruntime.get_available_providers()
    assert bool(runs["TensorRT"]) == ("TensorrtExecutionProvider" in available)


def test_openvino_is_refused_in_one_line(all_formats, tmp_path, monkeypatch):
    graph = (all_formats / "model.xml").read_bytes()
    for name, content, message in (
        ("a.xml", b"no model", "OpenVINO cannot use .*a.xml"),
        ("b.xml", graph, "OpenVINO cannot use .*b.xml: .*bin file cannot be found"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_detector(tmp_path / name)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(exported_module, "openvino_core", writers.openvino_core.__wrapped__)
    with pytest.raises(UserError, match="a.xml needs openvino: pip install"):
        load_detector(tmp_path / "a.xml")


class SignalStack(ctypes.Structure):
    """What sigaltstack(2) returns."""

    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def signal_stack():
    """Where this thread's signal handlers run."""
    found = SignalStack()
    assert not ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found.start


@pytest.mark.skipif(sys.platform != "linux", reason="sigaltstack of the C library")
def test_a_signal_after_openvino_does_not_end_the_process(all_formats):
    """Its CPU plugins would leave the thread with the freed stack of an earlier one."""
    detectors = [load_detector(all_formats / "model.xml") for _ in range(3)]
    before = signal_stack()
    del detectors[0]
    gc.collect()
    detectors.clear()
    gc.collect()
    assert signal_stack() == before
    load_detector(all_formats / "model.xml")
    gc.collect()
    assert signal_stack() == before


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """The small model in every form, written by the command from the checkpoint alone."""
    folder = tmp_path_factory.mktemp("exported")
    photographs([(200, 300)])[0].save(folder / "photo.png")
    files = {}
    for name, options in {
        "onnx": ["onnx"], "openvino": ["openvino"], "torch": ["torch"],
        "half onnx": ["onnx", "--half"],
        "half torch": ["torch", "--half"],
    }.items():
        output = folder / name.replace(" ", "_")
        export.main([
            "--checkpoint", checkpoint, "--output", str(output), "--threshold", "0.4",
            "--check", str(folder / "photo.png"), "--format", *options,
        ])
        files[name] = next(file for file in output.iterdir() if file.suffix != ".bin")
    return files


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino", "torch"])
def test_the_small_model_agrees(checkpoint, exported, form):
    model = load_detector(checkpoint, overrides=["train.device=cpu"])
    other = load_detector(exported[form], trusted=True)
    assert other.categories == CLASSES and other.image_format == model.image_format
    assert_agreement(model, other, photographs(SIZES))
    small = [(64, 64), (33, 800)] if form == "torch" else [(32, 32), (1, 1), (31, 800)]
    assert_agreement(model, other, photographs(small), least=0)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_half_precision_halves_the_weights(checkpoint, exported, form):
    model = load_detector(checkpoint, overrides=["train.device=cpu"])
    layers = [m for m in model.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    weights = sum(m.weight.nbytes for m in layers)
    whole, half = (exported[key].stat().st_size for key in (form, f"half {form}"))
    assert 0.9 * weights / 2 < whole - half < 1.1 * weights / 2
    other = load_detector(exported[f"half {form}"], trusted=True)
    if form == "torch":  # the same operations; onnxruntime has some of them in float32
        model.model = ExportedModel(DetectionGraph(model.model, half=True), 32)
    for expected, halved in zip(*(d(photographs(SIZES[:3])) for d in (model, other))):
        assert len(halved) == len(expected)
        assert (halved.scores - expected.scores).abs().max() < (1e-3 if form == "torch" else 0.05)


@pytest.mark.slow
def test_onnx_needs_nothing_of_this_project(checkpoint, exported):
    """As docs/deploy.md says it."""
    file = exported["onnx"]
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    dims = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert dims["images"][1] == 3 and dims["image_sizes"][1] == dims["output_sizes"][1] == 2
    assert all(isinstance(dims["images"][axis], str) for axis in (0, 2, 3))
    session = onnxruntime.InferenceSession(file)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == [item["name"] for item in CLASSES]
    assert json.loads(about["categories"]) == CLASSES
    assert about["score_threshold"] == "0.4" and about["image_format"] == "RGB"
    assert about["size_divisibility"] == "32" and about["precision"] == "float32"
    assert json.loads(about["config"])["preprocessing"]["image_format"] == "RGB"
    (photo,) = photographs([(256, 320)])
    images, size = np.asarray(photo).transpose(2, 0, 1)[None], np.array([[256, 320]])
    boxes, scores, classes = session.run(
        None, {"images": images, "image_sizes": size, "output_sizes": size}
    )
    expected = load_detector(checkpoint, overrides=["train.device=cpu"])(photo)
    found = Instances(
        (256, 320), pred_boxes=Boxes(torch.tensor(boxes[0])), scores=torch.tensor(scores[0]),
        pred_classes=torch.tensor(classes[0]),
    )
    assert compare(expected, found).holds


@pytest.mark.slow
@torch.no_grad()
def test_the_first_stages_are_exported(checkpoint, tmp_path):
    """What the whole model finds after them."""
    export.main(["--checkpoint", checkpoint, "--format", "onnx", "--output", str(tmp_path),
                 "model.decoder.num_stages=1"])
    model = load_detector(checkpoint, overrides=["train.device=cpu"])
    assert len(model.model.decoder.stages) > 1
    found, given = load_detector(tmp_path / "model.onnx"), []
    for picture in photographs(SIZES[:2]):
        given = [model.prepare(np.asarray(picture)[:, :, ::-1])]
        images = model.model.preprocess(given)
        logits, xyzr, _ = model.model.decode(images)
        detections = model.model.detect(logits[0], xyzr[0], images.image_sizes)
        expected = model.model.postprocess(detections, given)[0]["instances"]
        result = compare(expected, found(picture))
        assert result.holds and result.pairs > 10
        assert not compare(model(picture), found(picture)).holds


@pytest.mark.slow
def test_an_exported_config_is_resolved(exported):
    with pytest.raises(UserError, match="give the checkpoint"):
        load_detector(exported["onnx"], overrides=["model.detections_per_image=3"])


def test_a_difference_is_seen():
    """By the comparison that everything here relies on."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])

    def found(boxes, scores, classes=(0, 1)):
        return Instances(
            (50, 50), pred_boxes=Boxes(torch.as_tensor(boxes)), scores=torch.tensor(scores),
            pred_classes=torch.tensor(classes),
        )

    same = found(boxes, [0.9, 0.3])
    assert compare(same, same) == (2, 0, 0, 0) and compare(same, same).holds
    assert compare(same, found(boxes.flip(0), [0.3, 0.9], (1, 0))).holds  # order does not matter
    assert not compare(same, found(boxes + 0.6, [0.9, 0.3])).holds
    assert compare(same, found(boxes + 0.4, [0.9, 0.3])).holds
    assert not compare(same, found(boxes, [0.9, 0.302])).holds
    assert not compare(same, found(boxes, [0.9, 0.3], (0, 0))).holds
    assert compare(same, found(boxes[:1], [0.9], (0,))).lone == 1
    assert compare(found(boxes[:1], [0.9], (0,)), same).lone == 1
    assert compare(found(boxes, [0.9, 0.04]), found(boxes[:1], [0.9], (0,))).holds
    assert compare(found(boxes, [0.9, 0.0505]), found(boxes, [0.9, 0.0498])).holds
    assert compare(found(boxes[:0], [], ()), same).lone == 2
