#!/usr/bin/env python
"""Convert checkpoints and data sets into the formats that this project reads, and back."""

import argparse
import json
from pathlib import Path

import _start

from projects.stageinteractor.checkpoint.conversion import convert
from projects.stageinteractor.config.overrides import path_override
from projects.stageinteractor.data.formats import Mistakes, counts, read_voc, read_yolo, to_coco
from projects.stageinteractor.errors import UserError

CHECKPOINT = """\
Convert a checkpoint between the authors' released format (mmdet) and this project's.

    python tools/convert.py checkpoint released.pth here.pth
    python tools/convert.py checkpoint here.pth released.pth --to released
    python tools/convert.py checkpoint output/demo/model_best.pth weights.safetensors

StageInteractor and AdaMixer, with every backbone they were published with. Weights keep their bits
in both directions; what has no effect in the released code is omitted here and neutral there.
Training also loads released checkpoints directly, with train.init_checkpoint=released.pth.

OUT may also end in .safetensors, a format that holds only weights and text: the class names and the
config. A checkpoint of this project, of any model, can be changed from .pth to .safetensors and
back.
"""
DATASET = """\
Convert Pascal VOC XML or YOLO text annotations to COCO JSON, the format that training reads.

    python tools/convert.py dataset voc --annotations VOC/Annotations --images VOC/JPEGImages \\
        --splits VOC/ImageSets/Main/train.txt VOC/ImageSets/Main/val.txt --output OUT
    python tools/convert.py dataset yolo --data data.yaml --output OUT

OUT gets one JSON file per split; images stay where they are. All mistakes are listed with file and
line, and nothing is written while there are any, unless --skip-mistakes omits them. Folders are
read with all folders and links below them. The output ends with what was done beyond copying (boxes
clipped at the border, names that match but for case) and with every file that was left out.

VOC: pixels count from 1 and xmax is the last one of the box; with --zero-based, xmin to ymax are
edges from 0, as LabelImg among others writes them. A box up to one pixel over the border is
clipped, one further out is a mistake. An image belongs to the XML file of the same name, even if
<filename> differs; --splits may name files with or without their folder. Category ids follow the
sorted class names of the whole annotation folder, so they are the same for all splits. Difficult
objects become iscrowd=1: they are neither training targets nor counted in evaluation, which is the
nearest that COCO has.

YOLO: Ultralytics' layout, with `path`, `train`, `val` (or `valid`, `validation`), `test` and
`names` in data.yaml; a category id is the class index + 1. The labels of .../images/x.jpg are in
.../labels/x.txt, else beside the image; an image without that file has no objects. Polygons become
their bounding boxes, boxes are clipped to the image.

No library does this: supervision 0.31 loses `difficult`, split lists, nested folders, EXIF rotation
and the places of mistakes, globox 2.9 shifts VOC boxes by a pixel, datumaro 1.13 needs OpenCV,
pandas and Pillow below 13.
"""


def convert_dataset(args: argparse.Namespace):
    """Convert a data set and print what came of it.

    Raises:
        UserError: there are mistakes that are not to be skipped, or a file exists already. Nothing
            is written then.
    """
    mistakes = Mistakes()
    if args.format == "yolo":
        dataset = read_yolo(args.data, mistakes)
    else:
        options = {"lists": args.splits, "classes": args.classes, "zero_based": args.zero_based}
        dataset = read_voc(args.annotations, args.images, mistakes, **options)
    if mistakes and not args.skip_mistakes:
        raise UserError(f"nothing was written, mistakes: {len(mistakes)}\n{mistakes}\n"
                        "Fix them, or omit these boxes and images with --skip-mistakes")
    files = {name: args.output / f"{name}.json" for name in dataset.splits}
    for name, file in files.items():
        if not dataset.splits[name]:
            raise UserError(f"no image in split {name}\n{mistakes}".rstrip())
        if file.exists():
            raise UserError(f"{file} exists already: choose another --output")
    if mistakes:
        print(f"left out: {len(mistakes)}\n{mistakes}")
    args.output.mkdir(parents=True, exist_ok=True)
    for name, images in dataset.splits.items():
        text = json.dumps(to_coco(dataset.classes, images, dataset.image_root))
        with open(files[name], "x") as stream:
            stream.write(text)
        boxes = [box for image in images for box in image.boxes]
        empty, crowd = sum(not i.boxes for i in images), sum(box.iscrowd for box in boxes)
        difficult = f", {crowd} of them difficult" if crowd else ""
        print(f"{files[name]}: {len(images)} images, {empty} of them without objects; "
              f"{len(boxes)} boxes{difficult}; {len(dataset.classes)} classes")
    print(f"classes: {', '.join(dataset.classes)}")
    print(f"folder of the images: {dataset.image_root}")
    if remarks := counts(dataset.remarks):
        print(f"remarks:\n{remarks}")
    print(f"files left out: {sum(map(len, dataset.unused.values()))}")
    if unused := counts(dataset.unused):
        print(unused)
    train, val = (files.get(name, f"{name.upper()}.json") for name in ("train", "val"))
    paths = {"train": train, "val": val, "images": dataset.image_root}
    options = [path_override(f"dataset.{key}", path) for key, path in paths.items()]
    print("next: python tools/train_net.py --config-file CONFIG", *options)


def convert_checkpoint(args: argparse.Namespace):
    """Convert a checkpoint and print what came of it. Raises UserError."""
    print(convert(args.source, args.target, args.to))


def make_parser() -> argparse.ArgumentParser:
    """The command line: one line in --help for each subcommand, the whole text in its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{checkpoint,dataset}")

    def add(name: str, text: str, run) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text.partition("\n")[0], description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    checkpoint = add("checkpoint", CHECKPOINT, convert_checkpoint)
    checkpoint.add_argument("source", metavar="IN")
    checkpoint.add_argument("target", metavar="OUT")
    checkpoint.add_argument("--to", choices=("project", "released"), default="project")
    dataset = add("dataset", DATASET, convert_dataset)
    formats = dataset.add_subparsers(dest="format", required=True, metavar="{voc,yolo}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--output", type=Path, required=True, help="folder for the JSON files")
    shared.add_argument("--skip-mistakes", action="store_true",
                        help="omit what is wrong, box by box, and list it")
    voc = formats.add_parser("voc", parents=[shared], help="Pascal VOC XML")
    voc.add_argument("--annotations", type=Path, required=True, help="folder of XML files")
    voc.add_argument("--images", type=Path, required=True, help="folder of the images")
    voc.add_argument("--splits", type=Path, nargs="+", default=[], metavar="FILE",
                     help="files with a name on each line (default: everything in one split)")
    voc.add_argument("--classes", nargs="+", default=[], metavar="NAME",
                     help="names in order, or a .txt file with one on each line (default: sorted)")
    voc.add_argument("--zero-based", action="store_true", help="xmin to ymax are edges from 0")
    yolo = formats.add_parser("yolo", parents=[shared], help="YOLO text, Ultralytics' layout")
    yolo.add_argument("--data", type=Path, required=True, metavar="FILE", help="data.yaml")
    return parser


@_start.command
def main(argv=None):
    args = make_parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
