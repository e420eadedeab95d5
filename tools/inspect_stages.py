#!/usr/bin/env python
"""Look into the decoder: what every stage does with the queries of one picture.

    python tools/inspect_stages.py [--config-file FILE] --checkpoint FILE --image FILE \\
        --output FOLDER [--annotations FILE] [--queries N,N] [--count 6] [key=value ...]

For every stage: the boxes of the chosen queries, from the whole image to the object; their sampling
points, coloured by pyramid level; their scores; the queries that they attend to; how much of the
filters of earlier stages they mix with. With annotations, a COCO file that has the picture: what
the matcher chose, and which labels the cross-stage assigner kept, dropped, borrowed and refused,
with the IoU that decided it, as if this checkpoint was trained on.

Writes stages.html, one page that needs no network, queries.png, and query_N.png of each query;
a folder that holds any of them is refused.
"""

import argparse
from pathlib import Path

import _start
import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances

from projects.stageinteractor.data import read_picture
from projects.stageinteractor.data.coco import why_left_out
from projects.stageinteractor.data.coco_file import read_coco, sift
from projects.stageinteractor.inference.opening import require_stages
from projects.stageinteractor.files import prepare_output
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference import load_detector
from projects.stageinteractor.analysis.stage_page import render_page
from projects.stageinteractor.analysis.stage_panels import draw_overview, draw_query, shrink
from projects.stageinteractor.analysis.stage_record import (
    CHOSEN,
    check_queries,
    choose_queries,
    record_stages,
)

MOST = 12  # of the best, and of those that borrow; of more one could not tell the colours apart


def read_objects(
    annotations: str, image: str, picture: np.ndarray, class_names: list[str]
) -> Instances:
    """The objects of a picture as training sees them.

    Crowds and boxes of less than a pixel are left out, the others clipped to the picture.

    Args:
        annotations: a COCO file that has the picture.
        image: its file; that its name ends as the entry's file name does is enough.
        picture: (H, W, 3).
        class_names: the model's, by which the categories of the file are found.

    Returns:
        ``gt_boxes`` in pixels of the picture and ``gt_classes``.

    Raises:
        UserError: the file cannot be read, or has no such picture, another size or other classes.
    """
    content, findings = read_coco(annotations)
    if findings:
        raise UserError(f"{findings[0].where}: {findings[0].what}: check --annotations")
    coco, _ = sift(annotations, content)
    parts = Path(image).resolve().parts
    found = [entry for entry in coco.images
             if (names := Path(entry["file_name"]).parts) == parts[-len(names):]]
    if not found:
        raise UserError(
            f"{annotations} has no picture {Path(image).name}: give the file that describes it"
        )
    entry, (height, width) = found[0], picture.shape[:2]
    if (entry["width"], entry["height"]) != (width, height):
        raise UserError(
            f"{image} has {width} x {height} pixels, but {entry['width']} x {entry['height']} in "
            f"{annotations}"
        )
    names = {category["id"]: category["name"] for category in coco.categories}
    if unknown := sorted(set(names.values()) - set(class_names)):
        raise UserError(
            f"{annotations} has the class {unknown[0]}, which the model does not know: "
            f"{', '.join(class_names[:5])}{', ...' if len(class_names) > 5 else ''}"
        )
    objects = [
        item for item in coco.annotations
        if item["image_id"] == entry["id"] and not item.get("iscrowd")
        and not why_left_out(item, entry)
    ]
    if nameless := [item for item in objects if item["category_id"] not in names]:
        raise UserError(
            f"{annotations}: annotation {nameless[0]['id']} has the category "
            f"{nameless[0]['category_id']}, which is not in the file"
        )
    corners = [BoxMode.convert(o["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for o in objects]
    boxes = Boxes(torch.tensor(corners, dtype=torch.float32).view(-1, 4))
    boxes.clip((height, width))
    classes = [class_names.index(names[o["category_id"]]) for o in objects]
    return Instances((height, width), gt_boxes=boxes, gt_classes=torch.tensor(classes).long())


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them.

    Raises:
        ArgumentTypeError: it is something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no list of numbers, such as 3,57") from None


def inspect(args: argparse.Namespace):
    """Run the model and write the files.

    Raises:
        UserError: an input does not fit.
        OSError: a file cannot be written.
    """
    detector = load_detector(args.checkpoint, args.config_file, args.overrides)
    require_stages(detector.model)
    picture = read_picture(args.image, "BGR")
    objects: Instances | None = None
    if args.annotations:
        objects = read_objects(args.annotations, args.image, picture, detector.class_names)
    record = record_stages(detector.model, detector.prepare(picture), objects)
    if args.queries:
        queries = check_queries(args.queries, record)
    else:
        queries = choose_queries(record, args.count)
    pictures = {query: f"query_{query}.png" for query in queries}
    for name in ("stages.html", "queries.png", *pictures.values()):
        output = prepare_output(args.output, name)
    image, names = np.ascontiguousarray(picture[:, :, ::-1]), detector.class_names
    files = args.image, args.checkpoint, args.config_file
    title = ", ".join(Path(file).name for file in files if file)
    page = render_page(record, image, queries, names, title)
    (output / "stages.html").write_text(page, encoding="utf-8")
    record, image = shrink(record, image)
    draw_overview(record, image, queries, names).savefig(output / "queries.png")
    for query, picture_name in pictures.items():
        draw_query(record, image, query, names).savefig(output / picture_name)
    if objects is None:
        print("no labels: --annotations FILE shows what the picture's objects teach each stage")
    num_stages = len(record.scores)
    print(f"{'queries' if len(queries) > 1 else 'query'} {', '.join(map(str, queries))} in "
          f"{num_stages} stage{'s' if num_stages > 1 else ''}")
    print(f"{output / 'stages.html'}, queries.png and query_N.png of each written")


@_start.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="default: the checkpoint's own")
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument("--image", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--annotations", metavar="FILE", help="COCO file that has the picture")
    parser.add_argument("--queries", type=numbers, metavar="N,N", help="instead of the best")
    parser.add_argument("--count", type=int, default=CHOSEN, metavar="N",
                        help="how many of the best, and of those that borrow labels (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    if not 1 <= args.count <= MOST:
        raise UserError(f"--count is {args.count}: look at 1 to {MOST} queries of either kind")
    if len(args.queries or []) > 2 * MOST:
        raise UserError(f"--queries names {len(args.queries)}: look at {2 * MOST} at most")
    inspect(args)


if __name__ == "__main__":
    main()
