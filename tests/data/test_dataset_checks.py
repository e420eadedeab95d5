"""The checks of a data set find all faults at once, each with its place, and invent none."""

import copy
import json
import os
import random
import re
import struct
import zlib
from collections import Counter
from unicodedata import normalize
from urllib.parse import quote

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image

from projects.stageinteractor.data import coco_dataset
from projects.stageinteractor.data.coco_file import Finding, read_tables
from projects.stageinteractor.data.dataset_checks import Split, check_splits, describe
from projects.stageinteractor.data.object_checks import training_objects
from support.coco_splits import SIZE, Dataset, save_image
from support.shapes import make_shapes


@pytest.fixture
def dataset(tmp_path):
    return Dataset(tmp_path)


def test_a_clean_data_set_has_no_findings(dataset):
    assert dataset.check() == [] and describe([]) == ""


# What is wrong, the kind it is called, the entry it is found at, words of the sentence.
ENTRY_FAULTS = {
    "missing image": (("images", 0), {"file_name": "gone.png"}, "image 1", "gone.png"),
    "missing image: a folder": (("images", 0), {"file_name": "."}, "image 1", "folder"),
    "missing image: no name": (("images", 0), {"file_name": "a\0b\ud800"}, "image 1", "not there"),
    "missing image: endless": (("images", 0), {"file_name": "a" * 9999}, "image 1", "not there"),
    "size mismatch": (("images", 1), {"width": 65}, "image 2", "65 x 48 in the JSON, 64 x 48"),
    "size mismatch: swapped": (("images", 1), {"width": 48, "height": 64}, "image 2", "swapped"),
    "duplicate image id": (("images", 1), {"id": 1}, "image 1", "images[0], images[1]"),
    "duplicate file name": (("images", 1), {"file_name": "../images/train ä1.png"}, "image 2",
                            "image 1"),
    "duplicate annotation id": (("annotations", 5), {"id": 1}, "annotation 1", "annotations[5]"),
    "duplicate category id": (("categories", 1), {"id": 1}, "category 1", "categories[1]"),
    "duplicate category name": (("categories", 1), {"name": "cat"}, "category 2", "category 1"),
    "unknown image": (("annotations", 3), {"image_id": 9}, "annotation 4", "image_id 9"),
    "unknown category": (("annotations", 3), {"category_id": 9}, "annotation 4", "category_id 9"),
    "box without area": (("annotations", 2), {"bbox": [5, 5, 0, 9]}, "annotation 3", "[5, 5, 0"),
    "box without area: negative": (("annotations", 2), {"bbox": [9, 9, -4, -4]}, "annotation 3",
                                   "no area"),
    "box outside": (("annotations", 2), {"bbox": [64, 0, 9, 9]}, "annotation 3", "64 x 48"),
    "box outside: above": (("annotations", 2), {"bbox": [0, -9, 9, 9]}, "annotation 3", "image 2"),
    "broken entry: no id": (("images", 2), {"id": ...}, "images[2]", "no id"),
    "broken entry: no size": (("images", 2), {"width": ..., "height": None}, "image 3",
                              "no width; height is None"),
    "broken entry: size as text": (("images", 2), {"width": "64"}, "image 3", "width is '64'"),
    "broken entry: no pixels": (("images", 2), {"height": 0}, "image 3", "height is 0"),
    "broken entry: no name": (("categories", 1), {"name": 7}, "category 2", "name is 7"),
    "broken entry: no box": (("annotations", 4), {"bbox": ...}, "annotation 5", "no bbox"),
    "broken entry: NaN": (("annotations", 4), {"bbox": [0, 0, float("nan"), 9]}, "annotation 5",
                          "finite"),
    "broken entry: infinite": (("annotations", 4), {"bbox": [0, 0, 10**400, 9]}, "annotation 5",
                               "finite"),
    "broken entry: text box": (("annotations", 4), {"bbox": ["0", "0", "9", "9"]}, "annotation 5",
                               "four"),
    "broken entry: truths": (("annotations", 4), {"bbox": [True] * 4}, "annotation 5", "True"),
    "broken entry: three": (("annotations", 4), {"bbox": [1, 2, 3]}, "annotation 5", "[1, 2, 3]"),
    "broken entry: no such id": (("annotations", 4), {"id": [5]}, "annotations[4]", "id is [5]"),
    "broken entry: truth as id": (("annotations", 4), {"id": True}, "annotations[4]", "id is True"),
    "broken entry: infinite id": (("images", 2), {"id": float("inf")}, "images[2]", "id is inf"),
    "duplicate annotation id: text": (("annotations", 5), {"id": 2.0}, "annotation 2",
                                      "annotations[5]"),
    "unknown image: text": (("annotations", 3), {"image_id": "2"}, "annotation 4", "image_id '2'"),
    "broken entry: ignore": (("annotations", 4), {"ignore": 1}, "annotation 5", "ignore is 1"),
    "broken entry: crowd": (("annotations", 4), {"iscrowd": "no"}, "annotation 5", "iscrowd"),
}


@pytest.mark.parametrize("name", ENTRY_FAULTS)
def test_each_faulty_entry_is_a_mistake_with_its_place(dataset, name):
    (table, index), values, place, words = ENTRY_FAULTS[name]
    dataset.edit(table, index, **values)
    kind = name.split(":")[0]
    found = [f for f in dataset.check() if f.kind == kind]
    assert len(found) == 1 and found[0].is_mistake
    assert re.fullmatch(rf"{re.escape(dataset.path('train'))}: {re.escape(place)}( '.*')?",
                        found[0].where)
    assert words in found[0].what


LONE_FAULTS = [n for n in ENTRY_FAULTS if not re.match("dup.*(category|image) id|broken", n)]


@pytest.mark.parametrize("name", LONE_FAULTS)
def test_a_fault_brings_no_further_mistake(dataset, name):
    """Where an entry is lost or its id is another's, the rest can be affected."""
    (table, index), values, _, _ = ENTRY_FAULTS[name]
    dataset.edit(table, index, **values)
    related = {"different categories"} if table == "categories" else set()
    kinds = {f.kind for f in dataset.check() if f.is_mistake}
    assert kinds - related == {name.split(":")[0]}


def test_all_faults_come_at_once(dataset):
    """Each in an entry of its own, so that none hides another, together with those of files."""
    train = dataset.coco["train"]
    expected = Counter()
    for name, ((table, index), values, _, _) in ENTRY_FAULTS.items():
        entry = copy.deepcopy(train[table][index])
        entry["id"] = 100 + len(train[table])
        if table == "images" and "file_name" not in values:
            entry["file_name"] = f"{len(train[table])}.png"
            save_image(dataset.root / "images" / entry["file_name"])
        if table == "categories":
            entry["name"] = f"class {entry['id']}"
        train[table].append(entry)
        dataset.edit(table, -1, **values)
        expected[name.split(":")[0]] += 1
    (dataset.root / "images" / "train ä3.png").write_text("no image")
    dataset.edit("images", 0, split="val", file_name="train ä1.png")
    dataset.edit("annotations", 0, split="val", area=...)
    expected += Counter(["unreadable image", "shared image", "not evaluable"])
    findings = [f for f in dataset.check() if f.is_mistake and f.kind != "different categories"]
    assert Counter(f.kind for f in findings) == expected
    assert all(re.match(r".*/(train|val)\.json: (image|annotation|category|\w+\[)", f.where)
               for f in findings)


@pytest.mark.parametrize(
    "text, kind, line, words",
    [
        (b" \n", "empty file", "", "nothing in it"),
        (b'{"images": [],\n "annotations": [,]}', "not JSON", ": line 2 column 18", "Expecting"),
        (b'{"images":\n\n "\xff"}', "not JSON", ": line 3", "UTF-8"),
        (b'\xef\xbb\xbf{"images": []}', "not JSON", ": line 1 column 1", "BOM"),
        (b"[" * 200_000, "unreadable file", "", "recursion"),
        (b"3", "not COCO", "", "not a JSON object"),
        (b'[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]', "not COCO", "",
         "detections?"),
        (b'{"version": "5.0", "shapes": [], "imagePath": "a.png"}', "not COCO", "", "labelme"),
        (b'{"images": [], "categories": {"1": "cat"}}', "not COCO", "",
         "no annotations, categories is not a list"),
    ],
)
def test_a_file_that_is_no_coco_file_is_named(dataset, text, kind, line, words):
    finding, = dataset.check(text)
    assert finding[:2] == (kind, dataset.path("train") + line) and finding.is_mistake
    assert words in finding.what


def test_a_missing_file_is_named_and_the_other_is_checked_all_the_same(dataset):
    dataset.edit("annotations", 0, split="val", bbox=[0, 0, 0, 0])
    dataset.check()
    splits = {"train": Split(str(dataset.root / "gone.json"), "."),
              "val": Split(dataset.path("val"), str(dataset.root / "images"))}
    assert [f.kind for f in check_splits(splits)] == ["missing file", "box without area"]
    folder, = check_splits({"train": Split(str(dataset.root), ".")})
    assert folder.kind == "missing file" and "folder" in folder.what


@pytest.mark.parametrize("table", ["images", "annotations", "categories"])
def test_a_split_without_contents_is_empty(dataset, table):
    dataset.coco["train"][table] = []
    empty = [f for f in dataset.check() if f.kind == "empty split"]
    assert empty == [Finding("empty split", dataset.path("train"), f"no {table}")]


def test_a_split_without_usable_objects_is_empty(dataset):
    """As where boxes are shares of the image."""
    for index in range(6):
        dataset.edit("annotations", index, bbox=[0.1, 0.2, 0.5, 0.5])
    mistake, = [f for f in dataset.check() if f.is_mistake]
    assert mistake.kind == "empty split" and "none of the 6 annotations" in mistake.what
    assert "6 below a pixel" in mistake.what and "crowd" not in mistake.what


def test_a_split_of_crowds_is_said_to_be_one(dataset):
    for index in range(6):
        dataset.edit("annotations", index, iscrowd=1)
    finding, = dataset.check()
    assert finding.kind == "empty split" and finding.what.endswith(": 6 with iscrowd=1 (crowds)")


@pytest.mark.parametrize("fault, kind", [
    ({"bbox": [90, 90, 9, 9]}, "box outside"),
    ({"bbox": [9, 9, 0, 9]}, "box without area"),
    ({"image_id": 9}, "unknown image"),
    ({"bbox": None}, "broken entry"),
])
def test_what_other_mistakes_explain_is_not_said_again(dataset, fault, kind):
    for index in range(6):
        dataset.edit("annotations", index, **fault)
    assert {f.kind for f in dataset.check()} == {kind}
    dataset.edit("annotations", 5, image_id=3, bbox=[9, 9, 9, 9], iscrowd=1)
    empty, = [f for f in dataset.check() if f.kind == "empty split"]
    assert "none of the 6 annotations" in empty.what and "1 with iscrowd" in empty.what
    assert re.search("5 (outside|without|with another mistake)", empty.what)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_that_training_reads(dataset, suffix, orientation):
    """Detectron2's reader turns images as their EXIF tag says."""
    name = f"turned.{suffix}"
    exif = Image.Exif()
    exif[274] = orientation
    save_image(dataset.root / "images" / name, exif=exif)
    read = read_image(str(dataset.root / "images" / name), "RGB").shape[1::-1]
    dataset.edit("images", 0, file_name=name, width=read[0], height=read[1])
    assert not [f for f in dataset.check() if f.kind == "size mismatch"]
    dataset.edit("images", 0, width=SIZE[0], height=SIZE[1])
    found = [f.what for f in dataset.check() if f.kind == "size mismatch"]
    assert len(found) == (read != SIZE) and all("EXIF" in what for what in found)


@pytest.mark.parametrize("size", [SIZE, (40, 40)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turns_that_keep_the_size_are_remarked_on(dataset, orientation, size):
    """Against Detectron2's reader: where it changes pixels and the sizes do not tell."""
    exif = Image.Exif()
    exif[274] = orientation
    path = dataset.root / "images" / "turned.png"
    save_image(path, size, exif=exif)
    read = read_image(str(path), "RGB")
    dataset.edit("images", 0, file_name="turned.png", width=read.shape[1], height=read.shape[0])
    stored = np.asarray(Image.open(path))
    is_quiet_turn = read.shape == stored.shape and not np.array_equal(read, stored)
    found = [f for f in dataset.check() if f.kind == "EXIF orientation"]
    assert [f.where.split(": ")[1] for f in found] == ["image 1 'turned.png'"] * is_quiet_turn
    assert not any(f.is_mistake for f in found)


def test_a_turn_that_a_png_has_behind_its_pixels_is_remarked_on(dataset):
    path = dataset.root / "images" / "train ä1.png"
    data, exif = path.read_bytes(), Image.Exif()
    exif[274] = 3
    tag = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + tag
    late = struct.pack(">I", len(tag)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(data[:-12] + late + data[-12:])  # before IEND
    stored = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(read_image(str(path), "RGB"), stored[::-1, ::-1])
    assert [f.kind for f in dataset.check()] == ["EXIF orientation"]


def test_image_files_that_are_none_are_unreadable(dataset):
    images = dataset.root / "images"
    (images / "train ä1.png").write_bytes(b"")
    (images / "train ä2.png").write_bytes((images / "train ä3.png").read_bytes()[:20])
    found = dataset.check()
    assert [f.kind for f in found] == ["unreadable image"] * 2
    assert [f.where.split(": ")[1] for f in found] == ["image 1 'train ä1.png'",
                                                       "image 2 'train ä2.png'"]


def test_a_wrong_image_folder_is_one_finding(dataset):
    dataset.check()
    other = dataset.root / "other"
    other.mkdir()
    finding, = check_splits({"train": Split(dataset.path("train"), str(other))})
    assert finding.kind == "missing image" and "image 1" in finding.where
    assert "any other of the 3 images" in finding.what and str(other) in finding.what
    finding, = check_splits({"train": Split(dataset.path("train"), str(dataset.root / "gone"))})
    assert finding.kind == "missing image" and f"{dataset.root / 'gone'}" in finding.what


def nested(dataset, name):
    """Move the images into a folder of `images`, in which the JSON has them already, or not."""
    old = dataset.root / "images" / name
    (old.parent / "deep").mkdir(exist_ok=True)
    old.rename(old.parent / "deep" / name)
    return name


def renamed(change):
    def rename(dataset, name):
        path = dataset.root / "images" / name
        path.rename(path.with_name(change(name)))
        return name

    return rename


# How the JSON has the name of an image, and what is to be said of it.
NAMES_THAT_DIFFER = {
    "backslashes": (lambda _, name: f"images\\{name}", ["backslashes", "the folder"]),
    "Windows' absolute path": (lambda _, name: f"C:\\data\\{name}", ["backslashes", "absolute"]),
    "absolute path": (lambda _, name: f"/home/someone/{name}", ["absolute"]),
    "URL": (lambda _, name: f"http://host/{quote(name)}", ["URL encoding", "absolute"]),
    "URL encoding": (lambda _, name: quote(name), ["URL encoding"]),
    "URL encoding of the file": (renamed(quote), ["URL encoding"]),
    "upper case": (lambda _, name: name.replace(".png", ".PNG"), ["upper and lower case"]),
    "Unicode form": (lambda _, name: normalize("NFD", name), ["NFC or NFD"]),
    "Unicode form of the file": (renamed(lambda name: normalize("NFD", name)), ["NFC or NFD"]),
    "suffix": (lambda _, name: name.replace(".png", ".jpg"), ["the suffix"]),
    "no suffix": (lambda _, name: name.replace(".png", ""), ["the suffix"]),
    "case and form": (lambda _, name: normalize("NFD", name.upper()), ["case", "NFC or NFD"]),
    "one folder too many": (lambda _, name: f"images/{name}", ["give '{root}' as"]),
    "one folder too few": (nested, ["give '{root}/images/deep' as"]),
    "other folder": (lambda _, name: f"train/{name}", ["differ in the folder"]),
}
ALL_DIFFERENCES = (
    "backslashes", "URL encoding", "absolute", "case", "NFC", "the folder", "the suffix",
)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("how", NAMES_THAT_DIFFER)
def test_names_of_missing_images_are_compared_with_those_there(dataset, how, number):
    """All that are wrong in the same way are one finding, whether or not others are right."""
    change, expected = NAMES_THAT_DIFFER[how]
    for index, image in enumerate(dataset.coco["train"]["images"][:number]):
        dataset.edit("images", index, file_name=change(dataset, image["file_name"]))
    finding, = dataset.check()
    assert finding.kind == "missing image" and "train.json: image 1 " in finding.where
    assert f"({number} of 3 images)" in finding.what and "their folder?" not in finding.what
    for words in expected:
        assert words.format(root=dataset.root) in finding.what
    if "give" not in finding.what:
        said = finding.what.split("differ in")[1]
        assert sum(word in said for word in ALL_DIFFERENCES) == len(expected)


def test_several_files_that_can_be_meant_are_all_named(dataset):
    for folder in ("a", "b"):
        save_image(dataset.root / "images" / folder / "train.png")
    dataset.edit("images", 0, file_name="train.png")
    finding, = dataset.check()
    assert "'a/train.png' and 'b/train.png': which folder" in finding.what
    dataset.edit("images", 0, file_name="x/b/train.png")  # one has more in common with it
    finding, = dataset.check()
    assert "there is 'b/train.png': " in finding.what


def test_an_image_of_another_entry_is_no_hint(dataset):
    (dataset.root / "images/other").mkdir()
    dataset.edit("images", 0, file_name="other/train ä2.png")
    finding, = dataset.check()
    assert finding.what.endswith("is not there")


def test_splits_that_share_an_image_are_found(dataset):
    """By its file, however it is called, and by its content."""
    images = dataset.root / "images"
    (images / "copy.png").write_bytes((images / "train ä2.png").read_bytes())
    os.symlink(images / "train ä3.png", images / "link.png")
    last = {**dataset.coco["val"]["images"][2], "id": 4}
    dataset.coco["val"]["images"].append(last)  # of its own
    for index, name in enumerate(("x/../../images/train ä1.png", "copy.png", "link.png")):
        dataset.edit("images", index, split="val", file_name=name)
    (images / "x").mkdir()
    found = [f for f in dataset.check() if f.is_mistake]
    assert [f.kind for f in found] == ["shared image"] * 3
    for finding, number, how in zip(found, (1, 2, 3), ("file", "content", "file")):
        assert finding.where.startswith(f"{dataset.path('val')}: image {number} ")
        assert finding.what.startswith(f"the same {how}")
        assert f"image {number} of {dataset.path('train')}" in finding.what


def test_splits_that_share_all_images_are_one_finding(dataset):
    """And what else is wrong with a file that is both is said once."""
    dataset.edit("annotations", 0, bbox=[0, 0, 0, 0])
    dataset.check()
    images = str(dataset.root / "images")
    (dataset.root / "link.json").symlink_to(dataset.path("train"))
    for file in (dataset.path("train"), str(dataset.root / "link.json")):
        splits = {"train": Split(dataset.path("train"), images), "val": Split(file, images)}
        area, shared = check_splits(splits)
        assert area.kind == "box without area" and shared.kind == "shared image"
        assert shared.where == file and f"the same file as {dataset.path('train')}" in shared.what
    dataset.coco["val"] = copy.deepcopy(dataset.coco["train"])
    shared, = [f for f in dataset.check() if f.kind == "shared image"]
    assert f"all 3 images are in {dataset.path('train')} too" in shared.what


def test_categories_that_differ_between_splits_are_found(dataset):
    dataset.coco["val"]["categories"] = [{"id": 2, "name": "dogs"}, {"id": 1, "name": "cat"},
                                         {"id": 3, "name": "cow"}]
    mistakes = [f for f in dataset.check() if f.is_mistake]
    assert [f.kind for f in mistakes] == ["different categories"] * 2
    assert [f.where for f in mistakes] == [f"{dataset.path('val')}: category {i}" for i in (2, 3)]
    assert mistakes[0].what == f"'dogs' here, 'dog' in {dataset.path('train')}"
    assert mistakes[1].what == f"'cow' here, missing in {dataset.path('train')}"


def remarks(dataset):
    """Sentences of all remarks by kind, once it is sure that there is no mistake."""
    findings = dataset.check()
    assert not [f for f in findings if f.is_mistake]
    return {f.kind: f"{f.where}: {f.what}" for f in findings}


REMARKS = {
    "box over the edge": ({"bbox": [50, 5, 20, 9]}, "annotation 1: .* 6 pixels beyond"),
    "tiny box": ({"bbox": [5, 5, 9, 0.5]}, "annotation 1: .* less than a pixel"),
    "broken segmentations": ({"segmentation": [[1, 2, 3, 4]]}, "1 of 6 .* annotation 1: "),
    "duplicate boxes": ({"bbox": [6, 6.5, 20, 11], "category_id": 2},
                        r"1 of 6 .* annotation 2 \(as 1\)"),
    "crowds": ({"iscrowd": 1}, "1 with iscrowd .* annotation 1$"),
}


@pytest.mark.parametrize("kind", REMARKS)
def test_what_training_changes_about_an_object_is_a_remark(dataset, kind):
    values, words = REMARKS[kind]
    dataset.edit("annotations", 0, **values)
    found = remarks(dataset)
    assert found.keys() == {kind} and re.search(words, found[kind])


def test_a_box_of_another_class_is_no_duplicate(dataset):
    dataset.edit("annotations", 0, bbox=[6, 6.5, 20, 11])
    assert remarks(dataset) == {}


def test_a_box_may_reach_a_pixel_over_the_edge(dataset):
    dataset.edit("annotations", 0, bbox=[-1, -1, 66, 50])
    assert remarks(dataset) == {}
    dataset.edit("annotations", 0, bbox=[-1.1, -1, 66, 50])
    assert remarks(dataset).keys() == {"box over the edge"}


def test_boxes_that_may_be_corners_are_a_remark(dataset):
    for item in dataset.coco["train"]["annotations"]:
        x, y, w, h = item["bbox"]
        item["bbox"] = [x + 20, y + 20, x + 20 + w, y + 20 + h]
    assert "[x1, y1, x2, y2]" in remarks(dataset)["corners"]


@pytest.mark.parametrize("name, is_similar", [
    ("Cat", True), ("cat ", True), ("c at", True), ("c\u200bat", True), ("\uff43at", True),
    ("cats", False), ("cät", False),
])
def test_names_that_people_take_for_one_class_are_a_remark(dataset, name, is_similar):
    for coco in dataset.coco.values():
        coco["categories"][1]["name"] = name
    found = remarks(dataset)
    assert ("similar class names" in found) == is_similar
    assert not is_similar or f"'cat' and {name!r}" in found["similar class names"]


def test_similar_names_are_told_apart_across_splits_and_where_they_look_alike(dataset):
    dataset.edit("categories", 1, name=normalize("NFC", "ä"))
    dataset.edit("categories", 1, name=normalize("NFD", "ä"), split="val")
    finding, = [f for f in dataset.check() if f.kind == "similar class names"]
    assert dataset.path("train") in finding.where and dataset.path("val") in finding.where
    assert ascii("\xe4") in finding.what and ascii("a\u0308") in finding.what


def test_more_objects_than_evaluation_takes_are_a_remark(dataset):
    def add(number):
        dataset.coco["val"]["annotations"] = [
            {**dataset.coco["val"]["annotations"][0], "id": i, "bbox": [i / 9, 1, 9, 9]}
            for i in range(1, number + 1)
        ]

    add(100)
    assert "many objects" not in remarks(dataset)
    add(101)
    words = "1 images have more than 100 objects, image 1 has 101"
    assert words in remarks(dataset)["many objects"]


def test_category_ids_with_gaps_and_unused_classes_are_remarks(dataset):
    for coco in dataset.coco.values():
        coco["categories"].append({"id": 7, "name": "cow"})
    found = remarks(dataset)
    assert found.keys() == {"category ids", "classes without objects"}
    assert "1 to 7 for 3 classes" in found["category ids"]
    assert re.search("1 of 3 .*: 'cow'$", found["classes without objects"])


def test_images_that_training_leaves_out_are_remarks(dataset):
    save_image(dataset.root / "images" / "small.png", (64, 31))
    dataset.edit("images", 0, file_name="small.png", height=31)
    dataset.coco["train"]["annotations"][2:4] = []
    found = remarks(dataset)
    assert found.keys() == {"small image", "images without objects"}
    assert "image 1 'small.png'" in found["small image"]
    assert "2 of 3 have no object" in found["images without objects"]


def test_deep_images_are_a_remark(dataset):
    Image.new("I;16", SIZE).save(dataset.root / "images" / "deep.png")
    dataset.edit("images", 0, file_name="deep.png")
    assert remarks(dataset).keys() == {"more than 8 bits"}


def test_what_only_evaluation_needs_is_asked_of_what_is_evaluated(dataset):
    dataset.edit("annotations", 0, area=..., iscrowd=..., id=0)
    assert dataset.check() == []
    dataset.edit("annotations", 1, split="val", iscrowd=...)
    dataset.edit("annotations", 2, split="val", area="9")
    dataset.edit("annotations", 3, split="val", id=0)
    mistake, = dataset.check()
    assert mistake.kind == "not evaluable" and mistake.where.endswith("val.json: annotation 2")
    assert mistake.what.startswith("2 annotations")


@pytest.mark.parametrize("area", [-1, 0, 1, 10**9])
def test_areas_that_do_not_fit_their_boxes_are_one_remark(dataset, area):
    """In what is evaluated; a mask's area is right."""
    dataset.edit("annotations", 0, area=area)
    dataset.edit("annotations", 0, split="val", area=20 * 10 * 0.3)
    dataset.edit("annotations", 2, split="val", area=area)
    dataset.edit("annotations", 4, split="val", area=area)
    remark, = dataset.check()
    assert (remark.kind, remark.is_mistake) == ("area does not fit the box", False)
    assert remark.where.endswith("val.json: annotation 3")
    assert remark.what.startswith("2 annotations") and f"{area:g} in 20 x 12" in remark.what


def test_more_objects_than_detections_are_a_remark(dataset):
    """Of an image that is evaluated; crowds do not count."""
    def add(count, image, **more):
        annotations = dataset.coco["val"]["annotations"]
        annotations += [
            {**annotations[0], "id": f"{image}-{i}", "image_id": image, "bbox": [i / 9, 0, 20, 10],
             **more}
            for i in range(count)
        ]

    add(98, 1)
    add(99, 2)
    add(120, 3, iscrowd=1)
    found = {f.kind: f for f in dataset.check()}
    remark = found.pop("many objects")
    assert found.keys() == {"crowds"} and not remark.is_mistake
    assert remark.where.endswith("val.json") and remark.what.startswith("1 images")
    assert "image 2 has 101" in remark.what
    assert "dataloader.evaluator.max_dets_per_image" in remark.what


@pytest.mark.parametrize("rename", [
    lambda i: -i, lambda i: 2**64 + i, float, str, lambda i: (i, str(i))[i % 2],
], ids=["negative", "large", "float", "text", "mixed"])
def test_ids_of_any_kind_are_no_mistake(dataset, rename):
    """Only categories that are not 1 to n are worth a remark."""
    for coco in dataset.coco.values():
        for entry in [*coco["images"], *coco["annotations"], *coco["categories"]]:
            entry.update({k: rename(v) for k, v in entry.items() if k.endswith("id")})
    assert {f.kind for f in dataset.check()} <= {"category ids"}


def test_objects_are_those_that_training_keeps(tmp_path):
    """Against the loader that training uses."""
    file = make_shapes(tmp_path, images=9, size=[(96, 128), (31, 64), (32, 64)], crowd=True)
    coco, rng = json.loads(file.read_text()), random.Random(0)
    for item in coco["annotations"]:
        item["bbox"] = [rng.choice([-200, -5, 3, 40, 500]), 5, rng.choice([0.5, 1, 210]), 9]
        item["segmentation"] = rng.choice([[], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6]], [[]]])
    file.write_text(json.dumps(coco))
    expected = {
        record["image_id"]: [a["bbox"] for a in record["annotations"] if not a["iscrowd"]]
        for record in coco_dataset(json_file=str(file), image_root="images", training=True)
    }
    found = training_objects(read_tables(str(file)))
    assert {key: [a["bbox"] for a in items] for key, items in found.items()} == expected
    assert 0 < sum(map(len, expected.values())) < len(coco["annotations"])


JUNK = [
    None, True, -1, 0, 3.5, 10**400, 1e308, float("nan"), -float("inf"), "", "\ud800", "a\0", "/",
    [], {}, [[]], [{}], [1e308] * 4, [10**308] * 4, ["1"] * 4, {"counts": 1, "size": 7}, "x" * 5000,
]


def test_junk_is_reported_and_never_raised(dataset):
    rng, clean = random.Random(0), copy.deepcopy(dataset.coco)
    reported = 0
    for _ in range(300):
        dataset.coco = copy.deepcopy(clean)
        for _ in range(rng.randint(1, 4)):
            target = dataset.coco[rng.choice(("train", "val"))]
            while True:
                keys = list(target) if isinstance(target, dict) else range(len(target))
                if not keys:
                    break
                key = rng.choice(keys)
                if isinstance(target[key], (dict, list)) and rng.random() < 0.8:
                    target = target[key]
                    continue
                target[key] = copy.deepcopy(rng.choice(JUNK))
                break
        findings = dataset.check()
        describe(findings).encode()  # no half of a character either
        reported += bool(findings)
    assert reported > 200


def test_descriptions_group_by_kind_mistakes_first():
    findings = [Finding("tiny box", "a.json: annotation 1", "is tiny", is_mistake=False)]
    findings += [Finding("box outside", f"a.json: annotation {i}", "is outside") for i in range(12)]
    lines = describe(findings, limit=3).splitlines()
    assert lines == [
        "mistake: box outside (12)",
        *(f"  a.json: annotation {i}: is outside" for i in range(3)),
        "  ... and 9 more",
        "remark: tiny box (1)",
        "  a.json: annotation 1: is tiny",
    ]
    assert "more" not in describe(findings, limit=12)
