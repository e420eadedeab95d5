"""Input of every kind: it is read as documented, or named and refused, or skipped and counted."""

import io
import itertools
import json
import re
import resource
import struct
import subprocess
import traceback
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import train_net
from detectron2.config import instantiate
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from PIL import Image

from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.data import (
    NameUnreadable,
    ReadableBatches,
    ResizeShortestEdgeBilinear,
    build_train_loader,
    coco_dataset,
    loader,
)
from projects.stageinteractor.data.dataset_checks import Split, check_splits
from projects.stageinteractor.data.formats.conversion import Mistake, labelled_image
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference.inputs import to_array
from support.models import build
from support.runs import CONFIG, ROOT, metrics, overrides
from support.shapes import make_shapes

# ---- images

RNG = np.random.default_rng(0)
BLOCKS = RNG.integers(0, 256, (3, 4, 4), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
PICTURE, GREY, ALPHA = BLOCKS[..., :3], BLOCKS[..., 0], BLOCKS[..., 3]
BITS = GREY > 127
DEEP = RNG.integers(0, 65536, (48, 64, 3), dtype=np.uint16) >> RNG.integers(0, 16, (48, 64, 1))
JPEG = {"quality": 100, "subsampling": 0}


class Kind(NamedTuple):
    """An image file, what is to be read of it, and what the checks before a run find."""

    data: bytes | None  # None: there is no such file
    pixels: np.ndarray | None = None  # (H, W, 3), or (H, W) of a grey image; None: unreadable
    finding: str | None = None
    size: tuple = (64, 48)  # in the JSON, where there are no pixels

    @property
    def expected(self):
        """The tensor (3, H, W) that the model gets."""
        pixels = self.pixels if self.pixels.ndim == 3 else np.dstack([self.pixels] * 3)
        return pixels.transpose(2, 0, 1).astype(int)


def encode(image, format, **options):
    """The bytes of a file with an image, an array or one of Pillow's."""
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, format, **options)
    return file.getvalue()


def animation(format, **options):
    """Three frames, of which the picture is the first."""
    first, *rest = (Image.fromarray(np.roll(PICTURE, 16 * i, axis=1)) for i in range(3))
    data = encode(first, format, save_all=True, append_images=rest, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    return data


def png(pixels, size=(64, 48), depth=8, colour=2, chunks=()):
    """A PNG put together by hand, whose pixels may be any compressed bytes."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content)
        )

    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks)]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


def rows(array):
    """The compressed bytes of a PNG without filters."""
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in array))


def turned(pixels):
    """Pixels as they are to be shown, by the EXIF orientation they are stored with."""
    return {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(pixels),
    }


def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def palette(**options):
    image = Image.fromarray(PICTURE).quantize(12)
    assert (np.asarray(image.convert("RGB")) == PICTURE).all()
    return encode(image, "PNG", **options)


def of_cmyk(ink):
    """Red, green and blue of cyan, magenta, yellow and black."""
    ink = 1 - ink / 255
    return np.round(255 * ink[..., :3] * ink[..., 3:])


READABLE = {
    "colour.jpg": Kind(encode(PICTURE, "JPEG", **JPEG), PICTURE),
    "progressive.jpg": Kind(encode(PICTURE, "JPEG", progressive=True, **JPEG), PICTURE),
    "with garbage behind.jpg": Kind(encode(PICTURE, "JPEG", **JPEG) + b"garbage" * 99, PICTURE),
    "a PNG.jpg": Kind(encode(PICTURE, "PNG"), PICTURE),
    "colour.png": Kind(encode(PICTURE, "PNG"), PICTURE),
    "colour.gif": Kind(encode(PICTURE, "GIF"), PICTURE),
    "colour.webp": Kind(encode(PICTURE, "WEBP", lossless=True), PICTURE),
    "colour.tiff": Kind(encode(PICTURE, "TIFF"), PICTURE),
    "compressed.tiff": Kind(encode(PICTURE, "TIFF", compression="tiff_lzw"), PICTURE),
    "grey.jpg": Kind(encode(GREY, "JPEG", **JPEG), GREY),
    "grey.png": Kind(encode(GREY, "PNG"), GREY),
    "grey.gif": Kind(encode(GREY, "GIF"), GREY),
    "grey.tiff": Kind(encode(GREY, "TIFF"), GREY),
    "1 bit.png": Kind(encode(BITS, "PNG"), BITS * 255),
    "1 bit.tiff": Kind(encode(BITS, "TIFF", compression="group4"), BITS * 255),
    "16 bit grey.png": Kind(
        encode(DEEP[..., 0].astype(np.uint16), "PNG"), DEEP[..., 0] // 256, "more than 8 bits"
    ),
    "16 bit grey.tiff": Kind(
        encode(DEEP[..., 0].astype(np.uint16), "TIFF"), DEEP[..., 0] // 256, "more than 8 bits"
    ),
    "16 bit grey.jp2": Kind(
        encode(DEEP[..., 0].astype(np.uint16), "JPEG2000"), DEEP[..., 0] // 256,
        "more than 8 bits",
    ),
    "16 bit grey.pgm": Kind(
        b"P5 64 48 65535\n" + DEEP[..., 0].astype(">u2").tobytes(), DEEP[..., 0] // 256,
        "more than 8 bits",
    ),
    "turned 16 bit grey.png": Kind(
        encode(DEEP[..., 0].astype(np.uint16), "PNG", exif=exif(6)),
        np.rot90(DEEP[..., 0] // 256, -1), "more than 8 bits",
    ),
    "16 bit black.png": Kind(
        encode(np.zeros((48, 64), np.uint16), "PNG"), GREY * 0, "more than 8 bits"
    ),
    "16 bit.png": Kind(png(rows(DEEP.astype(">u2")), depth=16), DEEP // 256),
    "32 bit.tiff": Kind(
        encode(DEEP[..., 0].astype(np.int32), "TIFF"), DEEP[..., 0] // 256, "more than 8 bits"
    ),
    "float.tiff": Kind(
        encode((GREY * 0.99).astype(np.float32), "TIFF"), np.rint(GREY * 0.99), "more than 8 bits"
    ),
    "palette.png": Kind(palette(), PICTURE),
    "transparent palette.png": Kind(palette(transparency=3), PICTURE),
    "transparent colour.png": Kind(
        encode(PICTURE, "PNG", transparency=tuple(PICTURE[0, 0].tolist())), PICTURE
    ),
    "transparent.gif": Kind(encode(Image.fromarray(GREY), "GIF", transparency=5), GREY),
    "alpha.png": Kind(encode(BLOCKS, "PNG"), PICTURE),
    "alpha.webp": Kind(encode(BLOCKS, "WEBP", lossless=True, exact=True), PICTURE),
    "alpha.tiff": Kind(encode(BLOCKS, "TIFF"), PICTURE),
    "grey with alpha.png": Kind(encode(np.dstack([GREY, ALPHA]), "PNG"), GREY),
    "cmyk.jpg": Kind(
        encode(Image.frombytes("CMYK", (64, 48), BLOCKS.tobytes()), "JPEG", **JPEG),
        of_cmyk(BLOCKS),
    ),
    "cmyk.tiff": Kind(
        encode(Image.frombytes("CMYK", (64, 48), BLOCKS.tobytes()), "TIFF"), of_cmyk(BLOCKS)
    ),
    "animated.gif": Kind(animation("GIF"), PICTURE),
    "animated.png": Kind(animation("PNG"), PICTURE),
    "animated.webp": Kind(animation("WEBP", lossless=True), PICTURE),
    "pages.tiff": Kind(animation("TIFF"), PICTURE),
    "1 x 1.png": Kind(encode(PICTURE[:1, :1], "PNG"), PICTURE[:1, :1], "small image"),
    "1 x 1.jpg": Kind(encode(PICTURE[:1, :1], "JPEG", **JPEG), PICTURE[:1, :1], "small image"),
    "1 x 1.gif": Kind(encode(PICTURE[:1, :1], "GIF"), PICTURE[:1, :1], "small image"),
    "a row.png": Kind(encode(PICTURE[:1], "PNG"), PICTURE[:1], "small image"),
    "a thread.png": Kind(
        encode(PICTURE[:1].repeat(99, 1), "PNG"), PICTURE[:1].repeat(99, 1), "small image"
    ),
    "a column.jpg": Kind(encode(PICTURE[:, :1], "JPEG", **JPEG), PICTURE[:, :1], "small image"),
    **{
        f"turned {orientation}.{suffix}": Kind(
            encode(PICTURE, format, exif=exif(orientation), **options), pixels,
            "EXIF orientation" if orientation in (2, 3, 4) else None,
        )
        for orientation, pixels in turned(PICTURE).items()
        for suffix, format, options in (
            ("jpg", "JPEG", JPEG), ("png", "PNG", {}), ("webp", "WEBP", {"lossless": True}),
            ("tiff", "TIFF", {}), ("lzw.tiff", "TIFF", {"compression": "tiff_lzw"}),
        )
    },
}


def cut(name, share):
    """The first bytes of a readable file."""
    data = READABLE[name].data
    return data[:int(share * len(data))]


def spoilt(data):
    """A PNG as long as it was, with other bytes in the middle of its pixels."""
    data = bytearray(data)
    middle = (data.index(b"IDAT") + data.index(b"IEND")) // 2
    data[middle:middle + 4] = bytes(byte ^ 255 for byte in data[middle:middle + 4])
    return bytes(data)


STREAM, NOISE = rows(PICTURE), np.array(READABLE["16 bit.png"].pixels, dtype=np.uint8)
HEADERS = "unreadable image"  # wrong from the first bytes on, so that the checks find it
OTHER_RANGES = {
    "8 bits in 16.png": GREY.astype(np.uint16),
    "16 bits and a sign.tiff": DEEP[..., 0].astype(np.int32) - 99,
    "32 bits.tiff": DEEP[..., 0].astype(np.int32) << 8,
    "float of 16 bits.tiff": DEEP[..., 0].astype(np.float32),
    "float up to 1.tiff": (GREY / 255).astype(np.float32),
    "not a number.tiff": np.where(BITS, np.nan, GREY).astype(np.float32),
}
UNREADABLE = {
    **{
        name: Kind(encode(values, name[-4:].strip(".")), finding="more than 8 bits")
        for name, values in OTHER_RANGES.items()
    },
    "program.eps": Kind(encode(PICTURE, "EPS"), finding=HEADERS),
    "program called picture.png": Kind(encode(PICTURE, "EPS"), finding=HEADERS),
    "empty.jpg": Kind(b"", finding=HEADERS),
    "empty.png": Kind(b"", finding=HEADERS),
    "noise.png": Kind(RNG.bytes(999), finding=HEADERS),
    "zeros.jpg": Kind(bytes(999), finding=HEADERS),
    "page.jpg": Kind(b"<!DOCTYPE html><title>404 Not Found</title>", finding=HEADERS),
    "missing.jpg": Kind(None, finding="missing image"),
    "cut in its header.jpg": Kind(cut("colour.jpg", 0.2), finding=HEADERS),
    "cut in its pixels.jpg": Kind(cut("colour.jpg", 0.8)),
    "cut at its end.jpg": Kind(READABLE["colour.jpg"].data[:-2]),
    "cut in its header.png": Kind(READABLE["colour.png"].data[:20], finding=HEADERS),
    "cut.png": Kind(cut("colour.png", 0.5)),
    "cut.gif": Kind(cut("colour.gif", 0.95)),
    "cut.webp": Kind(cut("colour.webp", 0.5), finding=HEADERS),
    "cut.tiff": Kind(cut("colour.tiff", 0.5)),
    "broken stream.png": Kind(png(STREAM[:60] + b"\xff" * 8 + STREAM[68:])),
    "changed bytes.png": Kind(spoilt(png(rows(NOISE)))),
    "bomb.png": Kind(png(zlib.compress(bytes(9999)), (30000, 30000)), None, HEADERS,
                     (30000, 30000)),
    "bomb in a comment.png": Kind(
        png(STREAM, chunks=[(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 26)))]),
        finding=HEADERS,
    ),
    "turned, sized as stored.tiff": Kind(READABLE["turned 8.tiff"].data, finding="size mismatch"),
    "turned, sized as stored.jpg": Kind(READABLE["turned 6.jpg"].data, finding="size mismatch"),
}
KINDS = {**READABLE, **UNREADABLE}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """All kinds of images in a COCO file, each with an object."""
    folder = tmp_path_factory.mktemp("images")
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for number, (name, kind) in enumerate(KINDS.items(), start=1):
        if kind.data is not None:
            (folder / name).write_bytes(kind.data)
        width, height = kind.size if kind.pixels is None else kind.pixels.shape[1::-1]
        coco["images"].append(
            {"id": number, "file_name": name, "width": width, "height": height}
        )
        coco["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [0, 0, 1, 1]}
        )
    (folder / "all.json").write_text(json.dumps(coco))
    return folder


@pytest.fixture(scope="module")
def records(images):
    """Detectron2's dictionaries, by file name."""
    dataset = coco_dataset(json_file=str(images / "all.json"), image_root=str(images))
    return dict(zip(KINDS, dataset, strict=True))


def assert_read(name, image):
    assert image.dtype == torch.uint8
    tolerance = 3 if name.endswith(".jpg") else 1 if "cmyk" in name else 0
    np.testing.assert_allclose(image.numpy(), KINDS[name].expected, rtol=0, atol=tolerance)


def test_checks_find_what_headers_tell(images):
    """Each kind by its name, and nothing about the others."""
    findings = check_splits({"train": Split(str(images / "all.json"), str(images))})
    places = {f"{images / 'all.json'}: image {number} {name!r}": name
              for number, name in enumerate(KINDS, start=1)}
    found = [(places[f.where], f.kind) for f in findings if f.where in places]
    assert sorted(found) == sorted((n, kind.finding) for n, kind in KINDS.items() if kind.finding)


MAPPER = DatasetMapper(is_train=True, augmentations=[], image_format="RGB")
TEST_MAPPER = DatasetMapper(is_train=False, augmentations=[], image_format="RGB")


@pytest.fixture
def log(caplog, monkeypatch):
    """What a run says of its data, wherever other tests have sent the log."""
    for logger in (loader.LOGGER, train_net.LOGGER):
        monkeypatch.setattr(logger, "handlers", [caplog.handler])
        monkeypatch.setattr(logger, "propagate", False)
    return caplog


def draw(records, count, **options):
    """A loader, and the images of its first batches of one."""
    options = {"total_batch_size": 1, "max_unreadable": 1.0, "seed": 0, **options}
    batches = build_train_loader(records, mapper=MAPPER, **options)
    return batches, [image for batch in itertools.islice(batches, count) for image in batch]


def names_of(images):
    return [Path(image["file_name"]).name for image in images]


def test_training_reads_what_can_be_read_and_skips_the_rest(records, log):
    """With the same images in the same place, however many processes load them."""
    _, expected = draw([*records.values()], len(KINDS))
    log.clear()
    batches, images = draw([*records.values()], len(KINDS), num_workers=2)
    assert {*names_of(images)} == {*READABLE} and len(images) == len(KINDS)
    for name, image in zip(names_of(images), images):
        assert_read(name, image["image"])
    assert names_of(images) == names_of(expected)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(images, expected))
    assert {Path(file).name for file in batches.unreadable} == {*UNREADABLE}
    said = [Path(record.message.split(": ")[0]).name for record in log.records]
    assert sorted(said) == sorted(UNREADABLE)
    assert f"({len(UNREADABLE)} of {len(KINDS)} images so far" in log.records[-1].message


@pytest.mark.parametrize("name", READABLE)
def test_evaluation_and_detector_read_what_training_reads(records, name):
    """A detector in whatever form it is given the picture."""
    assert_read(name, NameUnreadable(TEST_MAPPER)(records[name])["image"])
    data, path = READABLE[name].data, Path(records[name]["file_name"])
    for picture in (path, str(path), data, bytearray(data), io.BytesIO(data), Image.open(path)):
        pixels = to_array(picture)[:, :, ::-1].transpose(2, 0, 1)
        assert_read(name, torch.from_numpy(pixels.copy()))


@pytest.mark.parametrize("name", OTHER_RANGES)
def test_numbers_of_another_range_are_told(records, name):
    """Never a picture that is black or white for reasons that nobody sees."""
    path = records[name]["file_name"]
    with pytest.raises(UserError, match=f"cannot read {path}: values from .* with 8 bits"):
        to_array(path)
    with pytest.raises(ValueError, match="values from .* with 8 bits"):
        to_array(Image.open(path))


@pytest.mark.parametrize("name", ["program.eps", "program called picture.png"])
def test_no_other_program_is_started(records, monkeypatch, name):
    """The format would have Ghostscript decode it, and be right about its size before."""
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *given, **options: started.append(given))
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **options: started.append(given))
    path = records[name]["file_name"]
    with pytest.raises(UserError, match="not an image in one of the formats"):
        to_array(path)
    with pytest.raises(Mistake):
        labelled_image(Path(path))
    assert not started


@pytest.mark.parametrize("name", UNREADABLE)
def test_evaluation_stops_at_what_cannot_be_read(records, name):
    dataset = [records["colour.png"], records[name]]
    batches = ReadableBatches(
        build_detection_test_loader(dataset, mapper=NameUnreadable(TEST_MAPPER), num_workers=0)
    )
    with pytest.raises(UserError, match=re.escape(f"cannot read {records[name]['file_name']}: ")):
        list(batches)


@pytest.mark.parametrize("name", ["1 x 1.png", "a row.png", "a column.jpg", "a thread.png"])
@pytest.mark.parametrize("resize", [[], [ResizeShortestEdgeBilinear(40, 96)]])
def test_a_model_takes_images_of_any_shape(records, name, resize):
    mapper = DatasetMapper(is_train=False, augmentations=resize, image_format="RGB")
    height, width = KINDS[name].expected.shape[1:]
    with torch.no_grad():
        found = build().eval()([mapper(records[name])])[0]["instances"]
    assert found.image_size == (height, width) and len(found) > 0
    boxes = found.pred_boxes.tensor
    assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
    assert found.scores.isfinite().all()


# ---- how many images training may do without


@pytest.mark.parametrize("total, share, allowed, processes", [
    (10, 0.2, 2, 1), (100, 0.29, 29, 1), (9, 0, 0, 1), (10, 0.2, 1, 2), (20, 0.2, 1, 4),
])
def test_training_does_without_a_share_and_no_more(
    images, monkeypatch, total, share, allowed, processes
):
    """Each of several processes counts for itself, up to its part of the share."""
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)

    def train(unreadable):
        names = [f"{number}.png" for number in range(unreadable)]
        names += ["colour.png"] * (total - unreadable)
        dataset = [{"file_name": str(images / name), "width": 64, "height": 48} for name in names]
        batches, _ = draw(
            dataset, 2 * processes * total, total_batch_size=processes, max_unreadable=share
        )
        return batches

    assert len(train(allowed).unreadable) == allowed
    with pytest.raises(UserError) as caught:
        train(allowed + 1)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"cannot read {images}") and first.count("No such file") == 1
    assert second.startswith(f"{allowed + 1} of {total} images could not be read")
    assert second.endswith(f"dataloader.train.max_unreadable={share:g}")


def test_training_on_nothing_that_can_be_read_stops(records):
    with pytest.raises(UserError, match="images could not be read"):
        draw([records[name] for name in UNREADABLE], 1)


class Slip(T.Augmentation):
    """An augmentation with a mistake in it."""

    def get_transform(self, image):
        return image.shape / 2


@pytest.mark.parametrize("training, workers", [(True, 0), (True, 1), (False, 0)])
def test_a_mistake_in_an_augmentation_keeps_its_traceback(records, training, workers):
    """It is not taken for an image that cannot be read."""
    mapper = DatasetMapper(is_train=training, augmentations=[Slip()], image_format="RGB")
    options = {"num_workers": workers, "total_batch_size" if training else "batch_size": 1}
    if training:
        batches = build_train_loader([records["colour.png"]], mapper=mapper, **options)
    else:
        mapper = NameUnreadable(mapper)
        batches = build_detection_test_loader([records["colour.png"]], mapper=mapper, **options)
    with pytest.raises(TypeError) as caught:
        next(iter(ReadableBatches(batches)))
    traced = "".join(traceback.format_exception(caught.value))
    assert "in get_transform" in traced and "image.shape / 2" in traced


# ---- the command


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """A training and a validation split, each with images of its own."""
    root = tmp_path_factory.mktemp("splits")
    return [make_shapes(root / name, images=8, size=(64, 96), seed=seed)
            for seed, name in enumerate(("train", "val"))]


@pytest.fixture
def command(monkeypatch):
    """The command's main() in this process, for a single iteration."""
    monkeypatch.chdir(ROOT)
    # All that it does besides would outlive the test.
    monkeypatch.setattr(train_net, "start_log", lambda cfg, args: seed_all_rng(0))

    def command(train, output, *flags, **options):
        options = {"train.max_iter": 1, "train.eval_period": 0, **options}
        arguments = ["--config-file", CONFIG, *flags, *overrides(train, output, **options)]
        train_net.main(train_net.parse_arguments(arguments))

    return command


@pytest.fixture
def refused(command, capfd):
    """Runs the command, which has to end with an error, and returns that."""
    def refused(*arguments, **options):
        with pytest.raises(SystemExit) as caught:
            command(*arguments, **options)
        assert caught.value.code == 1
        errors = capfd.readouterr().err
        assert errors.count("error: ") == 1 and "Traceback" not in errors
        return errors[errors.index("error: "):]

    return refused


def own(train, val):
    """The options that name one's own data."""
    return {"dataset.train": train, "dataset.val": val, "dataset.images": train.parent / "images",
            "dataset.val_images": val.parent / "images"}


@pytest.fixture
def broken(tmp_path):
    """A split whose images have sound headers, one of them without its last bytes."""
    file = make_shapes(tmp_path / "broken", images=8, size=(64, 96), seed=2)
    image = file.parent / "images/0003.png"
    image.write_bytes(image.read_bytes()[:-100])
    return file


def test_a_run_skips_an_image_that_cannot_be_read(command, splits, broken, tmp_path, log):
    command(broken, tmp_path / "out", **own(broken, splits[1]), **{
        "train.max_iter": 4, "dataloader.train.max_unreadable": 0.2,
    })
    said, = [record.message for record in log.records if "skipped" in record.message]
    assert f"{broken.parent}/images/0003.png: image file is truncated (1 of 8 images" in said
    assert "dataloader.train.max_unreadable=0.2 " in said
    assert (tmp_path / "out/model_final.pth").is_file()


def test_a_run_stops_where_too_many_cannot_be_read(refused, splits, broken, tmp_path):
    errors = refused(broken, tmp_path / "out", **own(broken, splits[1]), **{"train.max_iter": 4})
    first, second = errors.splitlines()
    assert first == f"error: cannot read {broken.parent}/images/0003.png: image file is truncated"
    assert second.startswith("1 of 8 images could not be read")
    assert second.endswith("dataloader.train.max_unreadable=0.01")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_names_an_image_that_cannot_be_read(
    refused, splits, broken, tmp_path, workers
):
    options = overrides(broken, tmp_path)
    torch.save({"model": instantiate(load_config(CONFIG, options).model).state_dict()},
               tmp_path / "model.pth")
    errors = refused(broken, tmp_path / "out", "--eval-only", **own(splits[0], broken), **{
        "train.init_checkpoint": tmp_path / "model.pth", "dataloader.test.num_workers": workers,
    })
    first, second = errors.splitlines()
    assert first == f"error: cannot read {broken.parent}/images/0003.png: image file is truncated"
    assert second.startswith("All images of a test set are evaluated")


# ---- annotations


def first(table="annotations", **values):
    """Sets keys of the first entry of a table."""
    return lambda coco: coco[table][0].update(values)


def every(**values):
    """Sets keys of all annotations."""
    def edit(coco):
        for item in coco["annotations"]:
            item.update(values)

    return edit


def without(table, is_left_out=lambda entry: True):
    """Takes entries out of a table."""
    def edit(coco):
        coco[table] = [entry for entry in coco[table] if not is_left_out(entry)]

    return edit


def crowded(coco):
    """Gives the first image 5000 objects, where the model has 10 queries."""
    boxes = np.random.default_rng(0).integers(1, 60, (5000, 4)).tolist()
    coco["annotations"] = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 9, "iscrowd": 0}
        for i, box in enumerate(boxes, start=1)
    ]
    coco["images"] = coco["images"][:1]


# What is wrong with a file, and what is to be said of it.
NO_COCO = {
    "": "train.json: nothing in it",
    '{"images": [': "train.json: line 1 column 13: ",
    "<html>": "train.json: line 1 column 1: ",
    "[]": "train.json: not a JSON object",
    '{"images": [], "annotations": {}}': "train.json: no categories, annotations is not a list",
}
REFUSED = {
    "NaN": (first(bbox=[0, 0, float("nan"), 9]), "annotation 1: bbox is [0, 0, nan, 9], not four"),
    "infinite": (first(bbox=[0, 0, float("inf"), 9]), "annotation 1: bbox is [0, 0, inf, 9], not"),
    "numbers as text": (first(bbox=["0", "0", "9", "9"]), "annotation 1: bbox is ['0', '0', '9',"),
    "size as text": (first("images", width="96"), "image 1: width is '96', not a whole number"),
    "negative": (first(bbox=[9, 9, -4, -4]), "annotation 1: [9, 9, -4, -4] has no area"),
    "zero area": (first(bbox=[9, 9, 0, 4]), "annotation 1: [9, 9, 0, 4] has no area"),
    "outside": (first(bbox=[96, 9, 5, 5]), "annotation 1: [96, 9, 5, 5] is outside the 96 x 64 "),
    "crowds only": (every(iscrowd=1), "with iscrowd=1 (crowds)"),
    "no objects": (without("annotations"), "no annotations"),
    "no images": (without("images"), "no images"),
    "no classes": (without("categories"), "no categories"),
}
# What training takes, and what it remarks.
TAKEN = {
    "over the edge": (first(bbox=[-9, -9, 20, 20]), "annotation 1: [-9, -9, 20, 20] reaches 9 pix"),
    "a crowd": (first(iscrowd=1), "1 with iscrowd"),
    "an empty image": (
        without("annotations", lambda item: item["image_id"] == 2),
        "1 of 8 have no object to learn from, the first is image 2",
    ),
    "thousands of objects": (crowded, "2 of 3 have no object to learn from: 'circle', 'triangle'"),
}


@pytest.fixture
def write(splits, tmp_path):
    """Writes a training split with other text or entries."""
    def write(text=None, edit=None):
        file = tmp_path / "train.json"
        (tmp_path / "images").symlink_to(splits[0].parent / "images")
        if edit:
            coco = json.loads(splits[0].read_text())
            edit(coco)
            text = json.dumps(coco)
        file.write_text(text)
        return file

    return write


@pytest.mark.parametrize("text", NO_COCO)
def test_a_file_that_is_no_data_set_is_refused(refused, write, splits, tmp_path, text):
    file = write(text)
    errors = refused(splits[1], tmp_path / "out", **own(file, splits[1]))
    assert f"{tmp_path}/{NO_COCO[text]}" in errors and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_in_entries_are_refused(refused, write, splits, tmp_path, name):
    edit, words = REFUSED[name]
    errors = refused(splits[1], tmp_path / "out", **own(write(edit=edit), splits[1]))
    assert re.search(rf"  {tmp_path}/train.json: .*{re.escape(words)}", errors)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_odd_is_remarked_and_trained_on(command, write, splits, tmp_path, log, name):
    """A step on 5000 objects is no larger than it has to be."""
    edit, words = TAKEN[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    command(splits[1], tmp_path / "out", **own(write(edit=edit), splits[1]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes
    remarks, = [record.message for record in log.records if "data set" in record.message]
    assert re.search(rf"  {tmp_path}/train.json: .*{re.escape(words)}", remarks)
    assert np.isfinite(metrics(tmp_path / "out")[0]["total_loss"])
    assert (tmp_path / "out/model_final.pth").is_file()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("text", NO_COCO)
def test_a_broken_file_that_a_config_names_is_named(
    refused, write, splits, tmp_path, text, split
):
    """Such files are not checked before a run; their entries may be odd, too."""
    errors = refused(splits[1], tmp_path / "out", **{
        f"dataloader.{split}.dataset.json_file": write(text),
    })
    assert errors.startswith(f"error: {tmp_path}/{NO_COCO[text]}") and len(errors.splitlines()) == 1


@pytest.mark.parametrize("edit, words", [
    (first("images", width="96"), "image 1: width is '96', not a whole number of pixels above 0"),
    (first(bbox=["0", "0", "9", "9"]), "annotation 1: bbox is ['0', '0', '9', '9'], not four"),
    (first(category_id=9), "annotation 1: category_id 9 is not among the categories"),
    (without("annotations"), "no annotations"),
    (without("images"), "no images"),
])
def test_entries_that_cannot_be_loaded_are_named(write, tmp_path, edit, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        coco_dataset(json_file=str(write(edit=edit)), image_root=".", training=True)
    assert f"{tmp_path}/train.json: " in str(caught.value)
