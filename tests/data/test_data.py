"""Images and boxes as the release trains on them: how they are resized, which are left out."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import BoxMode

from projects.stageinteractor.data import (
    ResizeShortestEdgeBilinear,
    coco_dataset,
    training_dicts,
)
from projects.stageinteractor.data.resize import BilinearResizeTransform
from projects.stageinteractor.errors import UserError


def sample(image, new_h, new_w):
    """Bilinear interpolation between the centres of pixels, one output pixel at a time."""
    h, w = image.shape[:2]
    output = np.zeros((new_h, new_w, *image.shape[2:]))
    for i in range(new_h):
        for j in range(new_w):
            y = min(max((i + 0.5) * h / new_h - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / new_w - 0.5, 0), w - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            upper = image[top, left] * (left + 1 - x) + image[top, right] * (x - left)
            lower = image[bottom, left] * (left + 1 - x) + image[bottom, right] * (x - left)
            output[i, j] = upper * (top + 1 - y) + lower * (y - top)
    return output


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    "shape, new_size",
    [
        ((12, 16, 3), (20, 27)),
        ((60, 90, 3), (16, 24)),
        ((40, 20, 3), (13, 31)),
        ((20, 30), (33, 10)),
        ((20, 30, 1), (7, 45)),
        ((1, 1, 3), (5, 4)),
        ((9, 1, 3), (4, 6)),
        ((11, 13, 3), (11, 13)),
    ],
)
def test_pixels_are_sampled_without_smoothing(shape, new_size):
    image = noise(*shape)
    resize = BilinearResizeTransform(*shape[:2], *new_size)
    resized, expected = resize.apply_image(image), sample(image, *new_size)
    assert resized.dtype == np.uint8 and resized.shape == expected.shape
    # Each of the two axes is rounded, with weights of some 14 bits.
    assert np.abs(resized - expected).max() < 1.01
    assert np.abs(resized - expected).mean() < 0.5
    exact = resize.apply_image(image.astype(np.float32))
    np.testing.assert_allclose(exact, expected, atol=1e-3)


def test_flipped_images_masks_and_the_way_back():
    image = noise(12, 16, 3)
    resize = BilinearResizeTransform(12, 16, 20, 27)
    flipped = resize.apply_image(image[:, ::-1])
    np.testing.assert_array_equal(flipped, resize.apply_image(image[:, ::-1].copy()))
    mask = (image[:, :, 0] > 128).astype(np.uint8) * 200
    assert set(np.unique(resize.apply_segmentation(mask))) == {0, 200}
    back = resize.inverse().apply_image(resize.apply_image(image))
    assert back.shape == image.shape
    assert np.abs(back - sample(resize.apply_image(image), 12, 16)).max() < 1.01


def test_sizes_are_rounded_as_released():
    """Also where Detectron2's are not."""
    surprises = [(319, 638), (310, 185), (132, 344), (370, 620)]
    sizes = [(480, 640), (1, 1), *surprises, *np.random.default_rng(0).integers(20, 2000, (300, 2))]
    for h, w in np.array(sizes).tolist():
        for short in range(400, 801, 16):
            resize = ResizeShortestEdgeBilinear(short, 1333).get_transform(np.empty((h, w)))
            scale = min(1333 / max(h, w), short / min(h, w))
            assert (resize.new_h, resize.new_w) == (int(h * scale + 0.5), int(w * scale + 0.5))
    for h, w in surprises:
        released = ResizeShortestEdgeBilinear(800, 1333).get_transform(np.empty((h, w)))
        detectron2 = T.ResizeShortestEdge(800, 1333).get_transform(np.empty((h, w)))
        assert (released.new_h, released.new_w) != (detectron2.new_h, detectron2.new_w)


def test_boxes_scale_by_the_exact_ratio_of_each_axis():
    image = noise(48, 65, 3)
    inputs = T.AugInput(image)
    transform = ResizeShortestEdgeBilinear(80, 133)(inputs)
    assert inputs.image.shape == (80, 108, 3)
    box = transform.apply_box(np.array([[3.0, 5.0, 65.0, 48.0]]))
    np.testing.assert_allclose(box, [[3 * 108 / 65, 5 * 80 / 48, 108, 80]])


def test_one_of_several_lengths_is_drawn():
    resize = ResizeShortestEdgeBilinear([8, 12, 16], 1000)
    drawn = {resize.get_transform(np.empty((10, 20, 3))).new_h for _ in range(100)}
    assert drawn == {8, 12, 16}


def write_coco(path, images):
    """A COCO file of `images`: (width, height, [(x, y, w, h, iscrowd), ...]) each."""
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for index, (width, height, boxes) in enumerate(images, start=1):
        coco["images"].append(
            {"id": index, "file_name": f"{index}.png", "width": width, "height": height}
        )
        for *box, iscrowd in boxes:
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1, "image_id": index, "category_id": 1,
                    "bbox": box, "area": box[2] * box[3], "iscrowd": iscrowd,
                }
            )
    path.write_text(json.dumps(coco))
    return str(path)


def kept_boxes(dicts):
    return {record["image_id"]: [item["bbox"] for item in record["annotations"]]
            for record in dicts}


def test_what_the_release_does_not_train_on_is_left_out(tmp_path):
    good, crowd = [4, 4, 9, 9, 0], [0, 0, 30, 30, 1]
    file = write_coco(
        tmp_path / "coco.json",
        [
            (64, 48, [good, [5, 5, 0.9, 9, 0], [5, 5, 9, 0.9, 0], [5, 5, 0, 0, 0], crowd]),
            (64, 48, [[7.3, 1.1, 1, 1, 0], [64, 0, 9, 9, 0], [0, 48, 9, 9, 0], [-9, 0, 9, 9, 0],
                      [0, -9, 9, 9, 0], [-8, -8, 9, 9, 0], [63, 47, 9, 9, 0]]),
            (64, 48, [[5, 5, 0.5, 9, 0], crowd]),
            (64, 48, [crowd]),
            (64, 48, []),
            (64, 31, [good]),
            (31, 64, [good]),
            (32, 32, [good]),
        ],
    )
    expected = {
        1: [good[:4], crowd[:4]],
        2: [[7.3, 1.1, 1, 1], [-8, -8, 9, 9], [63, 47, 9, 9]],
        8: [good[:4]],
    }
    name = str(tmp_path / "registered")
    register_coco_instances(name, {}, file, str(tmp_path))
    assert kept_boxes(training_dicts(name)) == expected
    files = {"json_file": file, "image_root": str(tmp_path)}
    assert kept_boxes(coco_dataset(**files, training=True)) == expected
    everything = coco_dataset(**files)
    assert len(everything) == 8 and len(everything[0]["annotations"]) == 5
    assert len(training_dicts([name, file])) == 6


def test_boxes_given_as_corners_are_understood(tmp_path):
    record = {"file_name": "1.png", "image_id": 1, "height": 40, "width": 50}
    boxes = [[10, 10, 20, 20], [10, 10, 10.5, 20], [10, 39, 20, 40]]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for box in boxes
    ]
    name = str(tmp_path / "corners")
    DatasetCatalog.register(name, lambda: [{**record, "annotations": annotations}])
    assert kept_boxes(training_dicts(name)) == {1: [boxes[0], boxes[2]]}


def test_nothing_to_train_on_is_said(tmp_path):
    """As where a data set's boxes are shares of the image."""
    file = write_coco(tmp_path / "coco.json", [(64, 48, [[0.1, 0.2, 0.5, 0.5, 0]])])
    with pytest.raises(UserError, match=r"coco.json: .*: 1 below a pixel .*\[x, y, width, "):
        coco_dataset(json_file=file, image_root=str(tmp_path), training=True)


@pytest.mark.parametrize("keep_empty", [False, True])
def test_annotations_are_counted_by_why_nothing_is_learned(tmp_path, keep_empty):
    images = [
        (64, 48, [[0, 0, 30, 30, 1]] * 3 + [[5, 5, 0.5, 9, 0], [70, 5, 9, 9, 0]]),
        (64, 31, [[4, 4, 9, 9, 0]] * 2),
    ]
    file = write_coco(tmp_path / "coco.json", images)
    with pytest.raises(UserError) as caught:
        coco_dataset(json_file=file, image_root=str(tmp_path), training=True,
                     filter_empty=not keep_empty)
    for words in ("none of the 7 annotations", "3 with iscrowd", "1 below a pixel", "1 outside",
                  "2 in an image with a side below 32"):
        assert words in str(caught.value)


def test_boxes_are_kept_whatever_their_segmentation_is(tmp_path):
    """As in evaluation, which reads boxes only; the rest is as Detectron2 loads it."""
    file = write_coco(tmp_path / "coco.json", [(64, 48, [[i, 4, 9, 9, 0] for i in range(8)])] * 3)
    expected = load_coco_json(file, "images", str(tmp_path / "detectron2"))
    coco = json.loads(Path(file).read_text())
    broken = [[[]], [[1, 2, 3, 4]], [1, 2, 3, 4, 5, 6], "", {}, {"counts": None}, 7, [[1, "a"]]]
    for item, segmentation in zip(coco["annotations"], broken):
        item.update(segmentation=segmentation, keypoints="none")
    coco["images"].reverse()
    Path(file).write_text(json.dumps(coco))
    assert coco_dataset(json_file=file, image_root="images") == expected
    found = MetadataCatalog.get(file), MetadataCatalog.get(str(tmp_path / "detectron2"))
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert found[0].get(key) == found[1].get(key)


def test_the_garbage_collector_waits_while_a_file_is_loaded(tmp_path):
    """With the objects of a whole data set to look at, it takes more time than loading them."""
    boxes = [[4, 4, 9, 9, 0]] * 20
    file = write_coco(tmp_path / "coco.json", [(64, 48, boxes)] * 200)
    threshold, runs = gc.get_threshold(), []
    def note(phase, _):
        runs.append(phase)

    gc.callbacks.append(note)
    gc.set_threshold(100)
    try:
        json.loads(Path(file).read_text())
        assert runs
        gc.collect()
        runs.clear()
        assert len(coco_dataset(json_file=file, image_root=".", training=True)) == 200
        assert len(runs) < 20  # before and after it
        with pytest.raises(UserError):
            coco_dataset(json_file=str(tmp_path / "none.json"), image_root=".")
        assert gc.isenabled()
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(note)


def test_a_file_that_no_figure_can_be_right_for_is_refused(tmp_path):
    """Even if nothing has checked it: ids that occur twice overwrite each other in evaluation."""
    file = Path(write_coco(tmp_path / "coco.json", [(64, 48, [[4, 4, 9, 9, 0]] * 2)]))
    coco = json.loads(file.read_text())
    coco["annotations"][1]["id"] = 1
    file.write_text(json.dumps(coco))
    with pytest.raises(UserError, match="coco.json: annotation ids are not unique"):
        coco_dataset(json_file=str(file), image_root=".")
