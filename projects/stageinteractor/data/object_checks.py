"""What can be wrong with the objects of a data set, and which of them training learns from."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from .coco import NO_AREA, OUTSIDE, nothing_to_learn, why_left_out
from .coco_file import NAMES, Finding, Tables, brief, remark

MOST_DETECTIONS = 100  # in an image that COCO's evaluation counts


def training_objects(tables: Tables) -> dict[int, list[dict]]:
    """The annotations that training learns from, by the id of their image."""
    images = {image["id"]: image for image in tables.images}
    objects = defaultdict(list)
    for item in tables.annotations:
        image = images.get(item["image_id"])
        if image and not why_left_out(item, image):
            objects[image["id"]].append(item)
    return dict(objects)


def check_boxes(json_file: str, tables: Tables) -> Iterator[Finding]:
    images = {image["id"]: image for image in tables.images}
    crossing, are_corners = 0, True
    for item in tables.annotations:
        where = f"{json_file}: annotation {item['id']}"
        image = images.get(item["image_id"])
        if image is None:
            continue
        x, y, w, h = map(float, item["bbox"])
        width, height = image["width"], image["height"]
        box = f"[{x:g}, {y:g}, {w:g}, {h:g}]"
        place = f"the {width} x {height} pixels of image {image['id']}"
        beyond = max(-x, -y, x + w - width, y + h - height)
        crossing += beyond > 1
        are_corners = are_corners and x < w <= width + 1 and y < h <= height + 1
        if w <= 0 or h <= 0:
            what = f"{box} has no area: bbox is [x, y, width, height]"
            yield Finding("box without area", where, what)
        elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
            yield Finding("box outside", where, f"{box} is outside {place}")
        elif w < 1 or h < 1:
            what = f"{box} is less than a pixel wide or high: training leaves it out"
            yield remark("tiny box", where, what)
        elif beyond > 1:
            what = f"{box} reaches {beyond:g} pixels beyond {place}: training clips it"
            yield remark("box over the edge", where, what)
    if crossing and are_corners:
        what = "all boxes would fit if they were [x1, y1, x2, y2]; COCO has [x, y, width, height]"
        yield remark("corners", json_file, what)


def check_duplicates(json_file: str, tables: Tables) -> Iterator[Finding]:
    first, repeated = {}, []
    for item in tables.annotations:
        if item.get("iscrowd"):  # which evaluation does not count
            continue
        key = item["image_id"], item["category_id"], *item["bbox"]
        if first.setdefault(key, item) is not item:
            repeated.append((item["id"], first[key]["id"]))
    if repeated:
        what = f"{len(repeated)} of {len(tables.annotations)} annotations have the image, class "
        what += "and box of another, the first is annotation {} (as {}): ".format(*repeated[0])
        what += "remove them, because evaluation counts each as a missed object"
        yield remark("duplicate boxes", json_file, what)


def check_segmentations(json_file: str, tables: Tables) -> Iterator[Finding]:
    """Segmentations are not used here, but broken ones are a sign of a broken export."""
    broken = [item["id"] for item in tables.annotations if _is_broken(item.get("segmentation"))]
    if broken:
        what = f"{len(broken)} of {len(tables.annotations)} are neither a mask nor a polygon of "
        what += f"three points, the first is that of annotation {broken[0]}: only their boxes are "
        yield remark("broken segmentations", json_file, f"{what}used, check that these are right")


def _is_broken(segmentation):
    if not segmentation:  # usual in files with boxes only
        return False
    if isinstance(segmentation, dict):
        return not {"counts", "size"} <= segmentation.keys()
    polygons = segmentation if isinstance(segmentation, list) else []
    return not any(
        isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        for polygon in polygons
    )


def check_objects(json_file: str, coco: dict, tables: Tables) -> Iterator[Finding]:
    """Whether there are objects to learn from, and which images and classes have none."""
    for table in NAMES:
        if not coco[table]:
            yield Finding("empty split", json_file, f"no {table}")
    objects = training_objects(tables)
    if not objects:
        yield from _check_reasons(json_file, coco, tables)
        return
    empty = [image["id"] for image in tables.images if image["id"] not in objects]
    if empty:
        what = f"{len(empty)} of {len(coco['images'])} have no object to learn from, the first is "
        what += f"image {empty[0]}: training leaves them out unless dataset.keep_empty=true"
        yield remark("images without objects", json_file, what)
    learned = {item["category_id"] for items in objects.values() for item in items}
    unused = [c["name"] for c in tables.categories if c["id"] not in learned]
    if unused:
        what = f"{len(unused)} of {len(coco['categories'])} have no object to learn from: "
        yield remark("classes without objects", json_file, what + brief.repr(unused)[1:-1])
    crowds = [item["id"] for item in tables.annotations if item.get("iscrowd")]
    if crowds:
        what = f"{len(crowds)} with iscrowd are neither trained on nor counted as missed, "
        yield remark("crowds", json_file, f"{what}the first is annotation {crowds[0]}")
    advice = f"evaluation counts {MOST_DETECTIONS} detections in each image, which lowers AP "
    advice += "unless you raise dataloader.evaluator.max_dets_per_image"
    yield from check_numbers("many objects", json_file, objects, MOST_DETECTIONS, advice)


def _check_reasons(json_file, coco, tables) -> Iterator[Finding]:
    """Why there is no object to learn from, unless other mistakes explain it already."""
    images = {image["id"]: image for image in tables.images}
    reasons = Counter(
        why_left_out(item, images[item["image_id"]])
        for item in tables.annotations if item["image_id"] in images
    )
    if reasons.keys() - {NO_AREA, OUTSIDE}:
        reasons["with another mistake"] = len(coco["annotations"]) - reasons.total()
        yield Finding("empty split", json_file, nothing_to_learn(+reasons))


def check_numbers(
    kind: str, json_file: str, objects: dict[int, list[dict]], most: int, advice: str
) -> Iterator[Finding]:
    """A remark if there are images with more objects than `most`."""
    numbers = {image: len(items) for image, items in objects.items() if len(items) > most}
    if numbers:
        image = max(numbers, key=numbers.get)
        what = f"{len(numbers)} images have more than {most} objects, image {image} has "
        yield remark(kind, json_file, f"{what}{numbers[image]}: {advice}")


def check_sizes(
    json_file: str, tables: Tables, least: float, scale: Callable[[int, int], float], advice: str
) -> Iterator[Finding]:
    """A remark if there are objects that are smaller than `least` pixels in the model's input.

    Args:
        scale: by which an image of that height and width in pixels is enlarged.
    """
    images = {image["id"]: image for image in tables.images}
    sizes = {
        item["id"]: math.sqrt(item["bbox"][2]) * math.sqrt(item["bbox"][3])
        * scale(images[image_id]["height"], images[image_id]["width"])
        for image_id, items in training_objects(tables).items() for item in items
    }
    small = [key for key, size in sizes.items() if size < least]
    if small:
        what = f"{len(small)} of {len(sizes)} objects have a size (square root of their area) "
        what += f"below {least} pixels as the model sees them, the first is annotation {small[0]}"
        yield remark("small objects", json_file, f"{what}: {advice}")
