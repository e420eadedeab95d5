#!/usr/bin/env python
"""Detect objects in images, videos or what a camera sees; write pictures, videos and JSON.

    python tools/demo.py [--config-file CONFIG] --checkpoint FILE --input PATH ... \\
        --output FOLDER [key=value ...]
    python tools/demo.py [--config-file CONFIG] --checkpoint FILE --camera 0 --output FOLDER

An input is an image, a video, a folder of images or a pattern in quotes, in which ** matches any
folders. CONFIG may be a run's own config.yaml; its data set need not exist.

FOLDER gets each image under its name, with the detections drawn by Detectron2, enlarged if it is
small; each video, as WebM without sound; and detections.json, in COCO's instance format with scores
and boxes in pixels of the input. With --format, it also gets copies of the images and the
detections as a data set that labelling tools read (docs/correct_detections.md). With --track,
detections in videos and of cameras have a track_id, which an object keeps from frame to frame;
images have none.
Ctrl-C ends the run early and keeps what has been written.
"""

import argparse
import sys

import _start

from projects.stageinteractor.analysis.detect_files import RESULT, FileDetection, find_inputs
from projects.stageinteractor.data.formats import FORMATS
from projects.stageinteractor.drawing.video import Video
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.files import prepare_output
from projects.stageinteractor.inference import load_detector
from projects.stageinteractor.inference.tiles import OVERLAP


@_start.command
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="default: the checkpoint's own")
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH")
    source.add_argument("--camera", type=int, metavar="NUMBER", help="0 is the first one")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument(
        "--threshold", type=float, default=0.3, metavar="SCORE",
        help="least score of what is drawn and written (%(default)s)",
    )
    parser.add_argument(
        "--format", choices=("coco", *FORMATS), default="coco",
        help="of the detections (%(default)s)",
    )
    parser.add_argument(
        "--tile", type=int, metavar="SIZE",
        help="cut large pictures into square tiles of so many pixels a side",
    )
    parser.add_argument(
        "--overlap", type=float, default=OVERLAP, metavar="SHARE",
        help="least share of a tile's side that the next one has too (%(default)s)",
    )
    parser.add_argument(
        "--track", action="store_true",
        help="number the objects in videos and of cameras; images stay without numbers",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold:g}: scores are between 0 and 1")
    inputs = find_inputs(args.input) if args.input else [Video(args.camera)]
    detector = load_detector(
        args.checkpoint, args.config_file, args.overrides, tile=args.tile, overlap=args.overlap
    )
    info = {name: getattr(args, name) for name in ("config_file", "checkpoint", "threshold")}
    results = [RESULT]
    if args.format != "coco":
        results += [FORMATS[args.format].images, *FORMATS[args.format].others]
    output, *_ = [prepare_output(args.output, name) for name in results]
    demo = FileDetection(detector, args.threshold, output, info, args.format, track=args.track)
    try:
        demo.run(inputs)
    except OSError as error:
        raise UserError(f"cannot write to {args.output}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        print(f"interrupted: {demo.summary()}", file=sys.stderr)
        sys.exit(130)
    print(demo.summary())


if __name__ == "__main__":
    main()
