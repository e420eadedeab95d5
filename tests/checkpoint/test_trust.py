"""Nothing is trusted: weights hold no code, tiny files ask for no memory, downloads are checked."""

import ast
import hashlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import nn

from projects.stageinteractor.checkpoint import ModelFile, SafeCheckpointer
from projects.stageinteractor.checkpoint import weight_files as files
from projects.stageinteractor.checkpoint.weight_files import (
    read_checkpoint,
    weights_of,
    write_safetensors,
)
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference.opening import fill

ROOT = Path(__file__).resolve().parents[2]
NO_CHECKPOINT = "it is not a whole checkpoint$"


def new_model():
    return nn.Sequential(OrderedDict(first=nn.Linear(2, 3), second=nn.Linear(3, 1)))


def nested(name, leaf):
    """A model with one layer under a dotted name."""
    for part in reversed(name.split(".")):
        leaf = nn.ModuleDict({part: leaf})
    return leaf


def refused(file, content=None):
    """The message with which a file, of that content, is not loaded."""
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        SafeCheckpointer(new_model()).load(str(file))
    assert len(str(caught.value).splitlines()) <= 2 and file.name in str(caught.value)
    return str(caught.value)


# ---- no code


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_cut_off_anywhere_is_incomplete(tmp_path):
    """Of some lengths, torch seeks to a place before the beginning."""
    torch.save({"model": {"first.weight": torch.zeros(40_000)}}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for length in [0, 1, 100, *range(1000, len(whole), 4000), len(whole) - 1]:
        assert re.search(NO_CHECKPOINT, refused(tmp_path / "cut.pth", whole[:length])), length


@pytest.mark.parametrize("suffix", ["pth", "pkl", "pyth", "safetensors"])
@pytest.mark.parametrize("by_torch", [True, False])
def test_a_malicious_file_does_not_run(tmp_path, suffix, by_torch):
    """Whatever it is called and whoever wrote it."""
    content = {"model": {"first.weight": Malicious(tmp_path / "trace")}}
    file = tmp_path / f"model.{suffix}"
    if by_torch:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    refused(file)
    assert [*tmp_path.iterdir()] == [file]


def calls(tree):
    """All calls in a source file, by the text of what is called, with their named arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            arguments = {word.arg: ast.unparse(word.value) for word in node.keywords}
            yield ast.unparse(node.func), arguments


def test_the_project_reads_no_code_as_data():
    unsafe = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load",
              "numpy.load", "os.system", "joblib.load", "torch.jit.load"}
    seen = set()
    for folder in ("projects", "configs", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            for name, arguments in calls(ast.parse(file.read_text(encoding="utf-8"))):
                seen.add(name)
                assert name not in unsafe, f"{file}: {name}"
                if name == "torch.load":
                    assert arguments.get("weights_only") == "True", file
                if name == "np.load":
                    assert arguments.get("allow_pickle") == "False", file
    assert {"torch.load", "yaml.safe_load"} <= seen


# ---- arrays of the model zoo, as numpy pickles them and as nobody does


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.arange(6, dtype="<i8").reshape(2, 3).T,
        np.array(3.5, np.float16),
        np.array([True, False]),
    ],
    ids=["big-endian", "by columns", "a number", "bool"],
)
def test_arrays_keep_their_values(tmp_path, array, protocol):
    file = tmp_path / "zoo.pkl"
    file.write_bytes(pickle.dumps({"a": array, "same": array}, protocol=protocol))
    for value in weights_of(read_checkpoint(str(file)), "zoo.pkl").values():
        assert value.shape == array.shape and value.numpy().dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(value.numpy(), array)


@pytest.mark.parametrize(
    "array",
    [np.array([None]), np.array(["text"]), np.zeros(2, "f4,O"), np.zeros(2, "M8[s]"),
     np.zeros(1, np.longdouble)],
    ids=["objects", "text", "a structure", "dates", "numbers that torch lacks"],
)
def test_arrays_of_something_else_than_numbers_are_refused(tmp_path, array):
    assert "zoo.pkl" in refused(tmp_path / "zoo.pkl", pickle.dumps({"first.weight": array}))


@pytest.mark.parametrize("code", ["O", "V8", "S4", "f4,O", "(2,)f4", "f", ""])
def test_types_are_those_of_numbers(code):
    with pytest.raises(pickle.UnpicklingError):
        files.NumberType(code, False, True)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def instructions(*parts):
    """A pickle of instructions, in which text stands for itself."""
    return b"\x80\x02" + b"".join(
        part if isinstance(part, bytes) else text(part) for part in parts
    ) + b"."


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"
BILLION = b"J" + struct.pack("<i", 10**9)
ADDRESSES = instructions(  # eight bytes of the file as an object of Python
    b"}", "first.weight", ARRAY, b"cnumpy\nndarray\nK\0\x85", "b", b"\x87R",
    b"(K\1K\1\x85cnumpy\ndtype\n", "V8", b"K\0K\1\x87R(K\3", "|", b"N", "a", b"\x85}", "a",
    b"cnumpy\ndtype\n", "O", b"\x85RK\0\x86sK\x08K\1K\0tb\x89C\x08AAAAAAAAtbs",
)


@pytest.mark.parametrize(
    "content",
    [
        instructions(b"]r\xff\xff\xff\x03"),
        instructions(ARRAY, b"cnumpy\nndarray\n", BILLION, b"\x85", "f8", b"\x87R"),
        instructions(b"cnumpy\nndarray\n", BILLION, b"\x85\x85R"),
        instructions(b"cnumpy\nndarray\n", BILLION, b"\x85\x85\x81"),
        instructions(b"cnumpy\ndtype\n", "(99999999,)f8", b"\x85R"),
        ADDRESSES,
        instructions(b"}" + b"q\0" + b"(" + b"h\0" * 1000 + b"t"),
        instructions(b"}q\0" + b"".join(b"(" + b"h%c" % i * 100 + b"tq%c" % (i + 1)
                                        for i in range(60))),
    ],
    ids=["memo", "reconstruct", "ndarray", "new ndarray", "dtype", "addresses", "wide", "nested"],
)
def test_a_tiny_pickle_asks_for_no_memory(tmp_path, content):
    tracemalloc.start()
    try:
        assert "model.pkl" in refused(tmp_path / "model.pkl", content)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_pickle_changes_nothing_of_the_reader(tmp_path):
    """The instruction that sets a state reaches functions and methods too."""
    function = instructions(b"c_codecs\nencode\n}", "changed", b"K\1sb")
    refused(tmp_path / "model.pkl", function)
    assert not vars(files.DataUnpickler.encode)
    shadowed = instructions(b"ccollections\nOrderedDict\n)R}", "items", b"K\1sb")
    for suffix, content in ((".pkl", shadowed), (".pth", zipped(shadowed))):
        (tmp_path / f"a{suffix}").write_bytes(content)
        content = read_checkpoint(str(tmp_path / f"a{suffix}"))
        assert type(content) is dict and content == {}
        nested_one = instructions(b"}", "model", shadowed[2:-1], b"s")
        content = nested_one if suffix == ".pkl" else zipped(nested_one)
        assert "no weight of the checkpoint fits" in str(pytest.raises(
            UserError, SafeCheckpointer(new_model()).load, write(tmp_path / f"b{suffix}", content)
        ).value)


GIGABYTE = 10**9
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpu"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


@pytest.mark.parametrize("suffix", [".pkl", ".pth", "legacy.pth"])
@pytest.mark.parametrize(
    "value",
    [
        b"cbuiltins\nbytearray\n" + number(GIGABYTE) + b"\x85R",
        b"c__builtin__\nbytearray\n" + number(GIGABYTE) + b"\x85R",
        b"\x8c\x08builtins\x8c\x09bytearray\x93" + number(GIGABYTE) + b"\x85R",
        b"ctorch\nFloatTensor\n" + number(GIGABYTE) + b"\x85R",
        b"ctorch\nTensor\n" + number(GIGABYTE) + b"\x85\x81",
        b"ctorch.storage\nUntypedStorage\n" + number(GIGABYTE) + b"\x85R",
        b"\x96" + struct.pack("<Q", GIGABYTE),
        b"\x8e" + struct.pack("<Q", GIGABYTE),
        b"\x8d" + struct.pack("<Q", GIGABYTE),
        b"\x95" + struct.pack("<Q", GIGABYTE),
        b"\x8b" + struct.pack("<I", GIGABYTE),
        b"T" + struct.pack("<I", GIGABYTE),
        STORAGE + number(GIGABYTE) + b"tQ",
        REBUILD + STORAGE + b"K\1tQK\0" + number(GIGABYTE) + b"\x85K\1\x85\x89N" + b"tR",
        # Copies of copies: each encoding would make the text twice as long.
        b"c_codecs\nencode\nq\1" + text("a" * 50) + b"q\2"
        + b"h\1h\2X\3\0\0\0hex\x86Rq\2" * 25,
        b"c_codecs\nencode\nq\1" + text("a" * 100_000) + b"q\2X\6\0\0\0latin1q\3]("
        + b"h\1h\2h\3\x86R" * 5000 + b"e",
        b"ccollections\nOrderedDict\nq\1" + b"](" + b"K\1K\2\x86" * 1000 + b"eq\2"
        + b"](" + b"h\1h\2\x85R" * 5000 + b"e",
    ],
)
def test_no_instruction_asks_for_memory(tmp_path, value, suffix):
    """Whichever reader of ours the suffix and the beginning of a file choose."""
    content = b"\x80\x02}" + text("model") + b"}" + text("first.weight") + value + b"ss."
    if suffix == ".pth":
        content = zipped(content, bytes(4))
    elif suffix == "legacy.pth":
        content = legacy(content.replace(b"tQ", b"NtQ"))
    tracemalloc.start()
    try:
        assert re.search(f"{NO_CHECKPOINT}|it refers to", refused(tmp_path / f"a{suffix}", content))
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "begin, end", [(b"}", b"K\1s"), (b"}(", b"K\1u"), (b"(", b"K\1d"), (b"\x8f(", b"\x90"),
                   (b"ccollections\nOrderedDict\n](", b"K\1\x86e\x85R")],
)
def test_no_key_overflows_the_stack(tmp_path, begin, end):
    """The hash of a tuple in a tuple, and so on."""
    content = b"\x80\x02" + begin + b")" + b"\x85" * 100_000 + end + b"."
    assert re.search(NO_CHECKPOINT, refused(tmp_path / "a.pkl", content))


def legacy(pickled, numbers=b""):
    """A .pth as torch wrote it before 1.6."""
    begin = (*files.LEGACY, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in begin) + pickled + numbers


def write(file, content):
    file.write_bytes(content)
    return str(file)


def zipped(pickled, data=b"", compression=zipfile.ZIP_STORED):
    """A .pth as torch writes it, around a pickle and data of one's own."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in (("data.pkl", pickled), ("version", "3\n"), ("data/0", data)):
            archive.writestr(f"model/{name}", content)
    return file.getvalue()


def test_a_packed_archive_is_refused_before_it_is_unpacked(tmp_path):
    """torch would unpack it: a thousand times the size of the file."""
    content = instructions(b"}")
    (tmp_path / "model.pth").write_bytes(zipped(content, bytes(100_000)))
    assert read_checkpoint(str(tmp_path / "model.pth")) == {}
    bomb = zipped(content, bytes(100_000), zipfile.ZIP_DEFLATED)
    assert refused(tmp_path / "model.pth", bomb).endswith(NO_CHECKPOINT[:-1])


@pytest.mark.parametrize("is_zip", [True, False])
def test_every_tensor_is_what_torch_reads(tmp_path, is_zip):
    """And so is everything else that checkpoints hold, with memory that is shared."""
    model, base = nn.Linear(3, 2), torch.randn(6, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {
        **{str(dtype): torch.randn(4, 3).to(dtype) for dtype in files.STORAGES.values()},
        "base": base, "turned": base.T, "part": base[2:4, 1:3], "rows": base[::2],
        "empty": torch.zeros(0, 2), "number": torch.tensor(3.5), "same": torch.ones(1).expand(5),
        "parameter": nn.Parameter(base), "model": model.state_dict(), "bytes": b"\0\xff",
        "optimizer": optimizer.state_dict(), "random": torch.get_rng_state(), "Bär": -(10**30),
        "schedule": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 4]).state_dict(),
    }
    file = str(tmp_path / "model.pth")
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    expected = flatten(torch.load(file, weights_only=True))
    found = flatten(read_checkpoint(file))
    assert [*found] == [*expected] and len(found) > 50
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value)
            assert found[key].dtype == value.dtype and found[key].stride() == value.stride()
        else:
            assert found[key] == value
    assert found["turned",].untyped_storage().data_ptr() == found["base",].data_ptr()


def flatten(value, key=()):
    """The leaves of dictionaries and lists by where they are."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        place: leaf for name, item in items for place, leaf in (
            flatten(item, (*key, name)) if isinstance(item, (dict, list, tuple)) else
            {(*key, name): item}
        ).items()
    }


def test_a_number_that_changed_on_the_disk_is_noticed(tmp_path):
    torch.save({"model": {"first.weight": torch.ones(3, 2)}}, tmp_path / "model.pth")
    whole = (tmp_path / "model.pth").read_bytes()
    ones = struct.pack("<6f", *[1] * 6)
    assert whole.count(ones) == 1
    spoilt = whole.replace(ones, struct.pack("<6f", *[1] * 5, 2))
    assert re.search(NO_CHECKPOINT, refused(tmp_path / "model.pth", spoilt))


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pyth"])
@pytest.mark.parametrize(
    "content",
    [
        {"blobs": 5}, {1: np.ones(1)}, {"model_state": {1: np.ones(1)}}, {"model": [1]},
        {"model": {}, "class_names": 5}, {"model": {}, "class_names": ["cat", 1]},
        {"model": {}, "class_names": {"cat": 1}},
    ],
)
def test_what_has_another_form_is_named(tmp_path, content, suffix):
    if suffix == ".pkl":
        (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / f"model{suffix}")
    assert f"model{suffix}" in refused(tmp_path / f"model{suffix}")


@pytest.mark.parametrize(
    "tensor", [torch.ones(3, 2).to_sparse(), torch.ones(3, 2, device="meta")],
    ids=["sparse", "meta"],
)
def test_tensors_without_all_of_their_numbers_are_refused(tmp_path, tensor):
    torch.save({"model": {"first.weight": tensor}}, tmp_path / "model.pth")
    assert "it refers to torch._utils._rebuild_" in refused(tmp_path / "model.pth")


# ---- safetensors


def test_weights_and_class_names_come_back_from_safetensors(tmp_path):
    """Whatever their type and place in memory; other tools can read the file too."""
    file, shared = str(tmp_path / "weights.safetensors"), torch.randn(4, 3)
    weights = {
        "shared": shared, "part": shared[1:3], "turned": shared.T, "one": torch.tensor(7),
        "parameter": nn.Parameter(torch.randn(2)), "repeated": torch.ones(1).expand(5),
        "half": torch.randn(3).bfloat16(), "empty": torch.zeros(0, 2),
    }
    write_safetensors(weights, ["cat", "Bär"], "", file)
    assert os.listdir(tmp_path) == ["weights.safetensors"]
    content = read_checkpoint(file)
    assert content["class_names"] == ["cat", "Bär"]
    for loaded in (content["model"], safetensors.torch.load_file(file)):
        assert loaded.keys() == weights.keys()
        for name, value in weights.items():
            assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype


def test_what_safetensors_cannot_hold_leaves_the_old_file(tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"old")
    with pytest.raises(ValueError):
        write_safetensors({"a": torch.ones(1, dtype=torch.complex128)}, [], "", str(file))
    assert file.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("first.weight", "first"),
        ("module.first.weight", "first"),
        ("roi_head.bbox_head.0.dynamic_conv.parameter_generator.weight",
         "decoder.stages.0.mixing.filter_generator"),
        ("layer1.0.conv1.weight", "backbone.res2.0.conv1"),
    ],
    ids=["ours", "of several processes", "released", "ImageNet"],
)
def test_safetensors_load_under_every_name_that_pth_does(tmp_path, theirs, ours):
    weight = torch.randn(3, 2)
    safetensors.torch.save_file({theirs: weight}, tmp_path / "weights.safetensors")
    model = nested(ours, nn.Linear(2, 3))
    SafeCheckpointer(model).load(str(tmp_path / "weights.safetensors"))
    assert torch.equal(model.state_dict()[f"{ours}.weight"], weight)


def test_safetensors_are_evaluated_on_their_own_classes_alone(tmp_path):
    """As --eval-only checks it."""
    file, trained = str(tmp_path / "weights.safetensors"), new_model()
    write_safetensors(trained.state_dict(), ["cat", "dog"], "", file)
    no_average = OmegaConf.create({"enabled": False})
    model = fill(new_model(), ModelFile.read(file), no_average, ["cat", "dog"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters()))
    with pytest.raises(UserError, match="other classes: number 1 is dog there and cow"):
        fill(new_model(), ModelFile.read(file), no_average, ["cat", "cow"])
    average = OmegaConf.create({"enabled": True, "decay": 0.9})
    with pytest.raises(UserError, match="has no moving average"):
        fill(new_model(), ModelFile.read(file), average, [])


def header(text, length=None):
    text = text.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


SOUND = safetensors.torch.save({"first.weight": torch.ones(3, 2)})
ENTRY = '{"a": {"dtype": "F32", "shape": [%d], "data_offsets": [0, %d]}}'


@pytest.mark.parametrize(
    "content",
    [
        b"", b"text, and no weights", SOUND[:-1], SOUND[:30], SOUND + b"more",
        np.random.default_rng(0).bytes(500), header("{}", 2**63), header("{}", 10**8),
        header(ENTRY % (2**40, 2**42)), header(ENTRY % (2**62, 4)) + bytes(4),
        header('{"__metadata__": {"class_names": "cat, dog"}}'), header("[" * 9999),
    ],
)
def test_broken_safetensors_are_named(tmp_path, content):
    assert refused(tmp_path / "broken.safetensors", content) == (
        f"cannot load {tmp_path / 'broken.safetensors'}: {NO_CHECKPOINT[:-1]}"
    )


@pytest.mark.parametrize("names", ["cat", 5, {"cat": 1}, [1]])
def test_class_names_of_another_form_are_named(tmp_path, names):
    content = safetensors.torch.save({"first.weight": torch.ones(3, 2)},
                                     {"class_names": json.dumps(names)})
    if names == "cat":
        SafeCheckpointer(new_model()).load(write(tmp_path / "one.safetensors", content))
    else:
        assert "class names are not a list" in refused(tmp_path / "names.safetensors", content)


# ---- downloads


class Answer(io.BytesIO):
    """What a server sends."""

    def info(self):
        return {}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Answers every address with ``server.content``, and counts."""
    class Server:
        content, fetched = b"", 0

    def answer(*_, **__):
        Server.fetched += 1
        return Answer(Server.content)

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", answer)
    return Server


@pytest.fixture
def published():
    """A checkpoint as bytes, and its sha256."""
    file = io.BytesIO()
    torch.save({"model": new_model().state_dict()}, file)
    return file.getvalue(), hashlib.sha256(file.getvalue()).hexdigest()


def test_an_address_that_anybody_could_answer_is_refused(server):
    with pytest.raises(UserError) as caught:
        SafeCheckpointer(new_model()).load("http://example.org/a.pth")
    first, second = str(caught.value).splitlines()
    assert "cannot fetch http://example.org/a.pth" in first and "https" in second
    assert "train.init_checkpoint=FILE" in second and not server.fetched


def test_a_download_that_is_not_what_its_name_promises_is_removed(server, tmp_path, published):
    """A process remembers what it has fetched, and still fetches it anew."""
    right, digest = published
    address = f"https://example.org/wrong/resnet-{digest[:8]}.pth?matching_heuristics=True"
    server.content = right[:-1] + b"!"
    wrong = hashlib.sha256(server.content).hexdigest()[:8]
    for attempt in (1, 2):
        with pytest.raises(UserError) as caught:
            SafeCheckpointer(new_model()).load(address)
        first, second = str(caught.value).splitlines()
        assert f"begins with {wrong}, not {digest[:8]}" in first and "try again" in second
        assert server.fetched == attempt
        assert not list((tmp_path / "cache").rglob("*.pth"))
    server.content = right
    SafeCheckpointer(new_model()).load(address.partition("?")[0])


@pytest.mark.parametrize("length", [8, 64])
def test_a_download_that_is_what_its_name_promises_loads(server, published, length):
    server.content, digest = published
    SafeCheckpointer(new_model()).load(f"https://example.org/right/a-{digest[:length]}.pth")
    assert server.fetched == 1


@pytest.mark.parametrize("name", ["model-20240131.pth", "model-abc123.pth", "model-final0000.pth"])
def test_names_that_promise_nothing_load(server, published, name):
    """A date is no hash, nor are fewer digits."""
    server.content = published[0]
    SafeCheckpointer(new_model()).load(f"https://example.org/plain/{name}")
    assert server.fetched == 1


# ---- known vulnerabilities

SKIPPED = "{0:22} Dependency not found on PyPI and could not be audited: {0} (1.0)\n"


@pytest.mark.parametrize(
    "output, status, expected, says",
    [
        ("No known vulnerabilities found\n", 0, 0, "No known"),
        ("No known vulnerabilities found\n" + SKIPPED.format("ours"), 0, 0, "No known"),
        ("Found 1 known vulnerability in 1 package\nName\ntorch 1.0 PYSEC-1\n"
         + SKIPPED.format("numpy"), 1, 2, "PYSEC-1"),
        ("Traceback\nrequests.exceptions.ConnectionError: name\n", 1, 0, "Nothing was audited"),
        ("No known vulnerabilities found\n" + SKIPPED.format("ours") + SKIPPED.format("numpy"), 0,
         0, "Nothing was audited"),
        ("No module named pip_audit\n", 1, 2, "No module named"),
    ],
    ids=["none", "none, one unknown", "found", "no network", "no real service", "no pip-audit"],
)
def test_an_audit_tells_what_is_vulnerable_from_what_nobody_could_say(
    tmp_path, output, status, expected, says
):
    (tmp_path / "output").write_text(output)
    stamp, tool = tmp_path / "stamp", tmp_path / "python"
    stamp.write_text("")
    tool.write_text(f"#!/bin/sh\ncat {tmp_path / 'output'}\nexit {status}\n")
    tool.chmod(0o755)
    done = subprocess.run(
        ["make", "--no-print-directory", "audit", f"PY={tool}", f"VENV={tmp_path}",
         f"STAMP={stamp}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )
    assert done.returncode == expected and says in done.stdout
    if says.startswith("Nothing"):
        assert len(done.stdout.splitlines()) == 1
