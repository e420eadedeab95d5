"""Whatever a file contains, readers answer with contents, findings or one line that names it.

Cases that once broke something stay as examples, each with a word on what it broke.
"""

import copy
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from projects.stageinteractor.checkpoint import ModelFile
from projects.stageinteractor.data import coco_dataset
from projects.stageinteractor.data.dataset_checks import Split, check_splits, describe
from projects.stageinteractor.errors import UserError
from support.coco_splits import Dataset

# What it notes for itself belongs to the caches, which git ignores.
set_hypothesis_home_dir(Path(__file__).resolve().parents[2] / ".pytest_cache" / "hypothesis")


def amounts(few, many):
    """How many cases an ordinary run tries, and how many `make test-all`."""
    return pytest.mark.parametrize("amount", [few, pytest.param(many, marks=pytest.mark.rare)])


def fuzz(check, cases, amount, examples=()):
    """Call ``check`` with the examples, then with an amount of cases, the same ones every time."""
    check = given(cases)(check)
    for case in examples:
        check = example(case)(check)
    settings(
        max_examples=amount, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )(check)()


@st.composite
def spoilt(draw, originals):
    """Bytes of a file in which a few places are overwritten, cut out or filled in."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([1, 1, 2, 8, 100, len(data)]))
        if draw(st.booleans()):
            del data[place:place + length]
        data[place:place + length] = draw(st.binary(max_size=9))
    return bytes(data)


# ---- checkpoints


def zipped(data_pkl):
    """A .pth as torch writes it, around a pickle of one's own."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", data_pkl)
        archive.writestr("model/version", "3\n")
        archive.writestr("model/data/0", bytes(24))
    return file.getvalue()


def originals(suffix):
    """Bytes of sound checkpoints."""
    weights = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int64)}
    content = {"model": weights, "class_names": ["cat", "dog"], "iteration": 7}
    if suffix == ".safetensors":
        return [safetensors.torch.save(weights, {"class_names": '["cat", "dog"]'})]
    if suffix == ".pkl":
        content["model"] = {name: value.numpy() for name, value in weights.items()}
        return [pickle.dumps(content, protocol=protocol) for protocol in (0, 2, 4, 5)]
    files = []
    for is_zip in (True, False):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=is_zip)
        files.append(file.getvalue())
    return files


def is_read_or_named(file):
    """Read a file as loading does. Whatever is wrong with it is named, and no file is made."""
    others = {entry: entry.stat().st_size for entry in file.parent.iterdir() if entry != file}
    try:
        opened = ModelFile.read(str(file))
        assert all(isinstance(value, torch.Tensor) for value in opened.weights.values())
        assert all(isinstance(name, str) for name in opened.class_names)
    except UserError as error:
        assert len(str(error).splitlines()) <= 2 and file.name in str(error)
    return others == {e: e.stat().st_size for e in file.parent.iterdir() if e != file}


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
@amounts(150, 8000)
def test_a_spoilt_checkpoint_is_read_or_named(tmp_path, suffix, amount):
    file = tmp_path / f"model{suffix}"

    def check(data):
        file.write_bytes(data)
        assert is_read_or_named(file)

    fuzz(check, spoilt(originals(suffix)), amount)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


# Instructions of pickles: what arrays are made of, containers, the memo, and ways to run code.
GLOBALS = [
    b"c_codecs\nencode\n", b"ccollections\nOrderedDict\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n",
    b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy._core.multiarray\n_reconstruct\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ctorch\nTensor\n",
    b"ctorch.nn.parameter\nParameter\n", b"cos\nmkdir\n", b"cbuiltins\neval\n",
    text(b"os") + text(b"mkdir") + b"\x93", b"ios\nmkdir\n", b"cbuiltins\nbytearray\n",
]
STORED = (b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu")
          + b"K\x06tQ")
TENSOR = (b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORED
          + b"K\0K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtR")
CONTAINERS = [b"}", b"]", b")", b"(", b"t", b"d", b"l", b"\x85", b"\x86", b"\x87", b"s", b"u", b"a",
              b"e", b"\x8f", b"\x90", b"\x91"]
VALUES = [b"N", b"\x88", b"K\x01", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
          b"G\x7f\xf8\0\0\0\0\0\0", text(b"a"), text(b"f4"), text(b"O"), text(b"model"),
          text(b"<"), b"C\x04abcd", b"C\0", text(b"trace"), text(b"items")]
MEMO = [b"q\0", b"h\0", b"r\xff\xff\xff\x7f", b"\x94", b"0", b"2", b"1"]
CALLS = [b"R", b"R", b"b", b"b", b"\x81", b"\x92", b"o", b"Pa\n", b"Q", b"\x82\x01"]
LENGTHS = [b"\x8e" + b"\xff" * 7 + b"\x7f", b"\x96" + b"\xff" * 7 + b"\x7f",
           b"\x8b\xff\xff\xff\x7f", b"\x95" + b"\xff" * 7 + b"\x7f", b"T\xff\xff\xff\x7f"]
INSTRUCTIONS = [STORED, TENSOR] + GLOBALS + CONTAINERS * 2 + VALUES * 2 + MEMO + CALLS * 2 + LENGTHS
ARRAY = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
         b"(K\x01K\x01\x85cnumpy\ndtype\n" + text(b"f4") + b"\x89\x88\x87R"
         b"(K\x03" + text(b"<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89C\x04abcdtb")
DICTIONARY = b"}" + text(b"model") + b"}" + text(b"a") + ARRAY + b"ss"


@st.composite
def pickles(draw):
    """Pickles of random instructions, most of them begun as a dictionary of an array."""
    begun = draw(st.sampled_from([b"", b"}" + text(b"a"), ARRAY, TENSOR, DICTIONARY]))
    place = draw(st.integers(0, len(begun)))
    body = b"".join(draw(st.lists(st.sampled_from(INSTRUCTIONS), max_size=12)))
    if draw(st.booleans()):
        place = len(begun)
    return b"\x80\x02" + begun[:place] + body + begun[place:] + b"."


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@amounts(200, 8000)
def test_a_pickle_of_any_instructions_is_read_or_named(tmp_path, suffix, amount, monkeypatch):
    file = tmp_path / f"model{suffix}"
    monkeypatch.chdir(tmp_path)  # where its folder would land

    def check(data):
        file.write_bytes(zipped(data) if suffix == ".pth" else data)
        assert is_read_or_named(file)

    fuzz(check, pickles(), amount, [b"\x80\x02" + DICTIONARY + b"."])


# ---- data sets

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from([10**400, -10**400, 2**63, 1e308, "\ud800", "a\0", "x" * 5000, -0.0]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
WHOLE = st.integers(-2, 9) | st.sampled_from([2**31, 2**63, 2**64, 10**400])
NUMBER = st.floats() | st.integers(-9, 99) | st.sampled_from([1e308, -1e308, 10**308, 2**70])
POLYGONS = st.lists(st.lists(NUMBER | JUNK, max_size=8), max_size=3)
MASK = st.fixed_dictionaries({
    "counts": st.lists(WHOLE | NUMBER | JUNK, max_size=5) | st.text(max_size=9) | JUNK,
    "size": st.lists(WHOLE | st.sampled_from([48, 64]) | JUNK, min_size=2, max_size=2) | JUNK,
})
# Values near those of a sound file, by key.
NEAR = {
    "id": WHOLE, "image_id": WHOLE, "category_id": WHOLE, "width": WHOLE, "height": WHOLE,
    "file_name": st.sampled_from([
        "val ä1.png", "../images/train ä1.png", "/", "/dev/zero", "/etc/hosts", "..", ".", "a\0b",
        "", " ", "\ud800", "a" * 9999, "train ä1.png/", "~", "CON", "../train.json",
    ]),
    "name": st.text(max_size=20) | st.sampled_from(["cat", "\ud800", "\n", "1e5", "\x1b[31m"]),
    "bbox": st.lists(NUMBER, min_size=4, max_size=4) | st.lists(NUMBER),
    "area": NUMBER, "iscrowd": st.sampled_from([0, 1, 2, True, False, 1.0, None]),
    "ignore": st.sampled_from([0, 1, False, 0.0, -0.0, "", None]),
    "segmentation": POLYGONS | MASK | st.sampled_from([None, [], {}, "", 0]),
    "keypoints": st.lists(NUMBER, max_size=6) | st.none(),
    "num_keypoints": WHOLE,
}
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["train", "train", "val"]),
        st.sampled_from(["images", "annotations", "annotations", "categories"]),
        st.integers(0, 5),
        st.one_of([st.tuples(st.just(key), values) for key, values in NEAR.items()] * 3
                  + [st.tuples(st.sampled_from([*NEAR]), JUNK),
                     st.tuples(st.sampled_from([*NEAR]), st.just(...)),
                     st.tuples(st.just(...), JUNK | st.just(...)),
                     st.tuples(st.text(max_size=5), JUNK)]),
    ),
    max_size=4,
)


# What the checks let pass. Detectron2's loader stumbled over sizes of a mask that are no whole
# numbers, or none that C can hold, and over such lengths of its runs; whatever writes the name of a
# class stumbled over half of a character.
FOUND = [
    [(split, "categories", 0, ("name", "\ud800")) for split in ("train", "val")],
] + [
    [("train", "annotations", 0, ("segmentation", mask))] for mask in (
        {"counts": [], "size": [0, None]}, {"counts": [], "size": [0, 2**64]},
        {"counts": ["a"], "size": [48, 64]}, {"counts": [-1, 2**70], "size": [48, 64]},
    )
]


def edit(coco, edits):
    """Set or remove keys of entries, replace or remove entries, as the edits say."""
    for split, table, index, (key, value) in edits:
        entries = coco[split][table]
        if not entries:
            continue
        index %= len(entries)
        if key is ...:
            entries[index:index + 1] = [] if value is ... else [value]
        elif isinstance(entries[index], dict):
            entries[index][key] = value
            if value is ...:
                del entries[index][key]


def load(split, **options):
    """Load a split as training or evaluation does, under no name that stays."""
    try:
        coco_dataset(json_file=split.json_file, image_root=split.image_root, **options)
        "".join(MetadataCatalog.get(split.json_file).thing_classes).encode()  # as a log does
    finally:
        DatasetCatalog.remove(split.json_file)
        MetadataCatalog.remove(split.json_file)


def check_and_load(dataset):
    """Check both splits, and load them if there is no mistake."""
    splits = {name: Split(dataset.path(name), str(dataset.root / "images"))
              for name in ("train", "val")}
    findings = check_splits(splits)
    describe(findings).encode()
    if not any(finding.is_mistake for finding in findings):
        load(splits["train"], training=True)
        load(splits["train"], training=True, filter_empty=False)
        load(splits["val"])


@amounts(150, 8000)
def test_a_data_set_of_any_entries_is_found_wrong_or_loads(tmp_path, amount):
    dataset = Dataset(tmp_path)

    def check(edits):
        coco = copy.deepcopy(dataset.coco)
        edit(coco, edits)
        for split, content in coco.items():
            with open(dataset.path(split), "w") as file:
                json.dump(content, file)
        check_and_load(dataset)

    fuzz(check, EDITS, amount, FOUND)


@amounts(100, 4000)
def test_a_spoilt_annotation_file_is_found_wrong_or_loads(tmp_path, amount):
    dataset = Dataset(tmp_path)
    dataset.check()
    with open(dataset.path("train"), "rb") as file:
        original = file.read()

    def check(data):
        with open(dataset.path("train"), "wb") as file:
            file.write(data)
        check_and_load(dataset)

    fuzz(check, spoilt([original]), amount)


@amounts(100, 4000)
def test_any_json_is_found_wrong_or_loads(tmp_path, amount):
    dataset = Dataset(tmp_path)
    dataset.check()
    entries = st.lists(JUNK | st.fixed_dictionaries({}, optional=NEAR), max_size=3) | JUNK
    tables = dict.fromkeys(("images", "annotations", "categories"), entries)

    def check(content):
        with open(dataset.path("train"), "w") as file:
            json.dump(content, file)
        check_and_load(dataset)

    fuzz(check, JUNK | st.fixed_dictionaries({}, optional=tables), amount)
