"""Conversion names every mistake with its file and line, and then writes nothing."""


import pytest

from support.annotated import (
    WIDTH,
    convert_voc,
    convert_yolo,
    error_of,
    make_voc,
    make_yolo,
    read,
    save_image,
    save_list,
    save_voc,
    voc_object,
)

# Lists of lists that would be 2^30 names if written out.
ALIASES = "\n".join(
    ["a0: &a0 [b, b]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30))]
)


@pytest.fixture
def voc(tmp_path):
    return make_voc(tmp_path)


@pytest.fixture
def yolo(tmp_path):
    return make_yolo(tmp_path)


def test_all_mistakes_in_voc_files_are_named_with_file_and_line(voc):
    save_voc(voc, "x.y", [
        voc_object(box=(5, 5, 4, 9)),
        voc_object(box=(5, 5, WIDTH + 2, 9)),
        voc_object(box=(5, "nan", 9, 9)),
        voc_object(box=(5, 5, 9)),
        voc_object(name=" "),
        voc_object(extra="<difficult>maybe</difficult>"),
        voc_object(),
    ])
    save_voc(voc, "no_image")
    (voc / "Annotations/broken.xml").write_text("<annotation>\n<object>\n</annotation>")
    (voc / "Annotations/html.xml").write_text("<html/>")
    (voc / "JPEGImages/empty.jpg").write_bytes(b"no image")
    save_list(voc / "val.txt", ["x.y", "no_image", "nowhere", "broken"])
    error = error_of(convert_voc, voc)
    for expected in (
        "x.y.xml:2: box 5 5 4 9 has no area",
        "x.y.xml:3: box 5 5 102 9 is not inside the image of 100 x 60 pixels",
        "x.y.xml:4: <ymin> is 'nan', not a number",
        "x.y.xml:5: <ymax> is missing",
        "x.y.xml:6: object without <name>",
        "x.y.xml:7: <difficult> is 'maybe': 0 or 1",
        "no_image.xml: needs one image named no_image.* in --images, found: none",
        "broken.xml:3: not XML (mismatched tag)",
        "html.xml:1: not VOC: <html> in place of <annotation>",
        "empty.xml: cannot be read as an image",
        "val.txt:3: no annotation ",
    ):
        assert expected in error
    assert "mistakes: 11\n" in error and "add --zero-based" not in error


def test_all_mistakes_in_yolo_files_are_named_with_file_and_line(yolo):
    save_list(yolo / "labels/train/ä b.txt", [
        "0 0.5 0.5 0.2",
        "",
        "0 0.5 0.5 0.2 0.2 0.9",
        "2 0.5 0.5 0.2 0.2",
        "-1 0.5 0.5 0.2 0.2",
        "0.5 0.5 0.5 0.2 0.2",
        "0 50 50 20 20",
        "0 0.5 0.5 0 0.2",
        "0 0.5 0.5 -0.2 0.2",
        "dog 0.5 0.5 0.2 0.2",
        "0 0.5 0.5 0.2 inf",
        "0 0.5 0.5 0.2 1.02",
        "0 0.5 0.5 0.2 0.2",
    ])
    save_list(yolo / "val.txt", ["images/val/x.y.jpg", "images/val/none.jpg"])
    (yolo / "labels/val/x.y.txt").write_bytes(b"\xff\xfe0")
    error = error_of(convert_yolo, yolo)
    for expected in (
        "ä b.txt:1: 4 values; expected",
        "ä b.txt:3: 6 values; expected",
        "ä b.txt:4: class 2, but data.yaml has 0 to 1",
        "ä b.txt:5: class -1,",
        "ä b.txt:6: class 0.5,",
        "ä b.txt:7: 0 50 50 20 20: not between 0 and 1",
        "ä b.txt:8: 0 0.5 0.5 0 0.2: the box has no area",
        "ä b.txt:9: 0 0.5 0.5 -0.2 0.2: not between 0 and 1",
        "ä b.txt:10: a value is 'dog', not a number",
        "ä b.txt:11: a value is 'inf', not a number",
        "ä b.txt:12: 0 0.5 0.5 0.2 1.02: not between 0 and 1",
        "val.txt:2: no image ",
        "x.y.jpg: x.y.txt is not text in UTF-8",
    ):
        assert expected in error
    assert "mistakes: 13\n" in error


def test_a_long_list_of_mistakes_is_cut_short(yolo):
    save_list(yolo / "labels/train/ä b.txt", ["7 0.5 0.5 0.2 0.2"] * 100)
    error = error_of(convert_yolo, yolo)
    assert error.count("class 7") == 20 and "and 80 more" in error


def test_mistakes_can_be_left_out_and_are_still_named(voc, capsys):
    save_voc(voc, "x.y", [voc_object(box=(5, 5, 4, 9)), voc_object("cat")])
    (voc / "JPEGImages/empty.jpg").unlink()
    convert_voc(voc, voc / "out", "--skip-mistakes")
    printed = capsys.readouterr().out
    assert "x.y.xml:2: box 5 5 4 9 has no area" in printed and "empty.xml: needs" in printed
    assert list(read(voc / "out/train.json")) == ["ä b.jpg"]
    assert read(voc / "out/val.json") == {"x.y.jpg": [("cat", [10, 20, 20, 20])]}


def test_a_split_that_mistakes_leave_empty_is_refused(voc):
    (voc / "JPEGImages/x.y.jpg").unlink()
    error = error_of(convert_voc, voc, "--skip-mistakes")
    assert "no image in split val" in error and "x.y.xml: needs one image" in error


@pytest.mark.parametrize(
    "entity",
    [
        "".join([
            '<!ENTITY l0 "ha">',
            *(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 30)),
        ]),
        '<!ENTITY l29 SYSTEM "file:///etc/hostname">',
    ],
    ids=["billion laughs", "external"],
)
def test_entities_are_refused(voc, entity):
    text = f"<!DOCTYPE a [\n{entity}]>\n<annotation>{voc_object('&l29;')}</annotation>"
    (voc / "Annotations/x.y.xml").write_text(text)
    assert "x.y.xml:2: declares the entity 'l" in error_of(convert_voc, voc)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("names: [a", "is not YAML"),
        ("train: images\nnames: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("- a", "`names` has to be"),
        ("train: images\nnames: {1: a, 2: b}", "`names` has to be"),
        ("train: images\nnames: [yes, no]", "`names` has to be"),
        ("train: images\nnames: []", "names: no classes"),
        ("train: images\nnames: [a, a]", "'a' is there twice"),
        ("train: images\nnames: [a]\nnc: 2", "nc is not 1, the number of `names`"),
        ("train: images\nnames: [a]\nkpt_shape: [17, 3]", "keypoints"),
        ("names: [a]", "none of train, val, test"),
        ("train: nowhere\nnames: [a, b]", "no folder and no .txt list of images"),
        ("path: [images]\ntrain: images\nnames: [a]", "`path` has to be the name of a folder"),
        ("train: 2017\nnames: [a]", "a split has to be a folder"),
        ("[" * 1000, "is not YAML"),
        (f"{ALIASES}\ntrain: *a29\nnames: [a]", "a split has to be a folder"),
        (f"{ALIASES}\ntrain: images\nnames: *a29", "`names` has to be"),
        ("path: nowhere\ntrain: images\nnames: [a, b]", "no folder and no .txt list of images"),
        ("train: images/val\nnames: [a]", "no labels at all: "),
        ("train: labels\nnames: [a]", "no image in split train"),
    ],
)
def test_mistakes_in_data_yaml(yolo, text, expected):
    (yolo / "data.yaml").write_text(text)
    assert expected in error_of(convert_yolo, yolo)


@pytest.mark.parametrize("encoding", ["gbk", "no such"])
def test_voc_files_in_encodings_that_cannot_be_read(voc, encoding):
    head = f'<?xml version="1.0" encoding="{encoding.replace(" ", "-")}"?>'
    (voc / "Annotations/x.y.xml").write_text(f"{head}\n<annotation/>")
    assert "x.y.xml: save it in UTF-8" in error_of(convert_voc, voc)


def test_voc_files_without_any_object_are_refused_with_the_reason(tmp_path):
    save_image(tmp_path / "JPEGImages/a.jpg")
    save_voc(tmp_path, "a")
    (tmp_path / "Annotations/b.xml").write_text("<html/>")
    error = error_of(convert_voc, tmp_path, "--skip-mistakes", splits=())
    assert "no object in any .xml" in error and "b.xml:1: not VOC" in error


def test_missing_files_are_named(tmp_path, voc):
    assert "no file " in error_of(convert_yolo, tmp_path)
    assert "no folder " in error_of(convert_voc, tmp_path, splits=())
    assert "nope.txt" in error_of(convert_voc, voc, splits=["nope.txt"])


def test_what_is_there_is_not_overwritten(voc):
    (voc / "out").mkdir()
    (voc / "out/val.json").write_text("mine")
    with pytest.raises(SystemExit, match="val.json exists already"):
        convert_voc(voc, voc / "out")
    assert [path.name for path in (voc / "out").iterdir()] == ["val.json"]
    assert (voc / "out/val.json").read_text() == "mine"


def test_splits_that_would_share_a_file_are_refused(voc):
    (voc / "other").mkdir()
    save_list(voc / "other/val.txt", ["x.y"])
    assert "same name" in error_of(convert_voc, voc, splits=["val.txt", "other/val.txt"])


def test_images_of_one_name_are_refused(voc):
    save_image(voc / "JPEGImages/x.y.png")
    assert "found: x.y.jpg, x.y.png" in error_of(convert_voc, voc)


def odd_images(folder):
    """Images that Pillow cannot read, by name: what it raises differs."""
    good = folder / "good"
    for suffix in ("png", "jpg", "tif", "gif", "bmp", "webp"):
        save_image(good.with_suffix(f".{suffix}"))
        data = good.with_suffix(f".{suffix}").read_bytes()
        yield f"cut.{suffix}", data[:20]
        yield f"zeros.{suffix}", data[:8] + bytes(100)
    yield "empty.jpg", b""
    yield "text.jpg", b"not an image"
    png = bytearray(good.with_suffix(".png").read_bytes())
    png[16:24] = bytes.fromhex("0001000000010000")  # 65536 x 65536 pixels
    yield "bomb.png", bytes(png)
    yield "no size.png", png[:16] + bytes(8) + png[24:]
    yield "cut pixels.png", bytes(good.with_suffix(".png").read_bytes()[:-30])
    tiff = good.with_suffix(".tif").read_bytes()
    for tag in (256, 257, 258, 259, 262, 273, 277):  # each in turn has another number, or odd type
        entry = tag.to_bytes(2, "little")
        yield f"without {tag}.tif", tiff.replace(entry, b"\x01\x80", 1)
        place = tiff.index(entry, 8)
        yield f"odd {tag}.tif", tiff[:place + 2] + b"\x0c\x00" + tiff[place + 4:]


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_each_odd_image_is_one_mistake(kind, request, tmp_path, capsys):
    root = request.getfixturevalue(kind)
    images = root / ("JPEGImages" if kind == "voc" else "images/train")
    odd = dict(odd_images(tmp_path))
    for name, data in odd.items():
        (images / name).write_bytes(data)
        if kind == "voc":
            stem = name.replace(".", " ")
            (images / name).rename(images / f"{stem}.{name.split('.')[1]}")
            save_voc(root, stem, [voc_object()], size=None)
    (images / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    save_voc(root, "gone") if kind == "voc" else None
    label = root / ("Annotations/link.xml" if kind == "voc" else "labels/train/link.txt")
    label.symlink_to(tmp_path / "nowhere")
    convert, options = (convert_voc, {"splits": ()}) if kind == "voc" else (convert_yolo, {})
    convert(root, root / "out", "--skip-mistakes", **options)
    printed = capsys.readouterr().out
    left_out = int(printed.split("left out: ")[1].split()[0])
    found = read(root / f"out/{'all' if kind == 'voc' else 'train'}.json")
    assert left_out + len(found) == len(odd) + 1 + (4 if kind == "voc" else 2)
    assert left_out >= 20
