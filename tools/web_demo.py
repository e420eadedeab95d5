#!/usr/bin/env python
"""A web page to try a model: drop a picture, see its detections and what every stage did.

    pip install -e '.[web]'
    python tools/web_demo.py [--config-file FILE] --checkpoint FILE [--host 127.0.0.1] \\
        [--port 7860] [key=value ...]

The page is for this machine alone unless --host says otherwise; there is no password. Neither the
server nor the page calls anybody else. Pictures may be private: they lie in a temporary folder that
only its user may read, for about ten minutes each. When the server ends, by Ctrl-C or by SIGTERM,
the folder is removed.
"""

import argparse
import errno
import html
import io
import ipaddress
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import List, NamedTuple, Optional

# Detectron2 still scripts a function as it is imported.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # drawn as a box

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.structures import Instances
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference import Detector, load_detector
from projects.stageinteractor.modeling import StageInteractor
from projects.stageinteractor.visualization.detections import class_metadata, draw_detections
from projects.stageinteractor.visualization.stage_page import render_page
from projects.stageinteractor.visualization.stage_record import choose_queries, record_stages

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow's others are no photographs
MAX_BYTES, MAX_MEGAPIXELS = 20 * 2**20, 50
LIMITS = f"A picture may have {MAX_BYTES // 2**20} MB and {MAX_MEGAPIXELS} megapixels."
TOO_LARGE = f"The file is too large: {MAX_BYTES // 2**20} MB at most."
SIDE = 1000  # pixels of the longer side of what is drawn on, which sets the size of letters
KEEP = 600  # seconds that files stay
STYLE = """
.gradio-container { width: 100%; max-width: 1200px !important; margin: auto !important; }
.html-container { padding: 0 !important; overflow-wrap: anywhere; }
h2 { margin: 0 !important; }
.error { color: #b3261e !important; }
.dark .error { color: #f2b8b5 !important; }
#detections table { width: 100%; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
#detections td, #detections th { padding: 2px 0 2px 10px; text-align: right; }
#detections td:first-child, #detections th:first-child { padding: 2px 0; text-align: left; }
#detections td:first-child { overflow-wrap: anywhere; }
#detections table, #detections tr, #detections td, #detections th { border: 0; }
#detections td { border-top: 1px solid var(--border-color-primary); }
#stages iframe { width: 100%; height: min(820px, 90vh); border: 0; }
"""
# Gradio refuses large files in the browser, with a message that soon goes, and no event of its own.
WATCH_FILES = """
for (const name of ["change", "drop"])
    document.addEventListener(name, event => {
        const {files} = event.dataTransfer ?? event.target;
        if (event.target.closest("#file") && files[0]?.size > %d) trigger("input");
    }, true);
""" % MAX_BYTES


def refusal(reason: str) -> tuple:
    """What the page shows instead of an answer."""
    return f'<p class="error">{html.escape(reason)}</p>', None, "", None, ""


class Found(NamedTuple):
    """What a model has found in a picture, with boxes in pixels of the picture that was given."""

    picture: np.ndarray  # RGB, resized so that its longer side is SIDE
    scale: float  # of that to the picture that was given
    instances: Instances  # on the CPU, best first, as models give them


def decode_picture(data: bytes) -> np.ndarray:
    """The picture in a file, turned as its EXIF data says: (H, W, 3), BGR, uint8.

    Raises:
        UserError: it is none, broken, or has too many pixels, which are then not decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_MEGAPIXELS * 1e6:
                raise Image.DecompressionBombError
            turned = ImageOps.exif_transpose(image)
            if turned.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
                turned = Image.fromarray((np.asarray(turned) >> 8).clip(0, 255).astype(np.uint8))
            return convert_PIL_to_numpy(turned, "BGR")
    except Image.DecompressionBombError:
        raise UserError(f"The picture is too large: {MAX_MEGAPIXELS} megapixels at most.")
    except Image.UnidentifiedImageError:
        raise UserError(f"The file is no picture in one of the formats {', '.join(FORMATS)}.")
    except Exception as error:  # Pillow's readers raise all sorts
        raise UserError(f"The picture is broken: {error}.")


def detect(detector: Detector, image: np.ndarray) -> Found:
    """The detections of a model in a picture (H, W, 3), BGR, uint8."""
    instances = detector(image)
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1])).resize(size)
    return Found(np.asarray(picture), scale, instances)


def draw(found: Found, shown: Instances, class_names: List[str]) -> np.ndarray:
    """The picture with some of its detections, RGB."""
    boxes = shown.pred_boxes.clone()
    boxes.scale(found.scale, found.scale)
    scaled = Instances(found.picture.shape[:2], **{**shown.get_fields(), "pred_boxes": boxes})
    return draw_detections(found.picture, scaled, class_metadata(class_names))


def table(instances: Instances, class_names: List[str]) -> str:
    """Detections as rows of an HTML table."""
    head = "".join(f"<th>{name}</th>" for name in ("class", "score", "x", "y", "width", "height"))
    rows = []
    boxes = instances.pred_boxes.tensor.tolist()
    for box, score, index in zip(boxes, instances.scores, instances.pred_classes):
        x1, y1, x2, y2 = map(round, box)
        cells = (class_names[index], f"{score:.2f}", x1, y1, x2 - x1, y2 - y1)
        rows.append("".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def describe_stages(detector: Detector, image: np.ndarray) -> str:
    """What every stage did, as HTML, or why there is nothing to tell."""
    if not isinstance(detector.model, StageInteractor):
        name = type(detector.model).__name__
        return f"<p>{name} has no decoder whose stages could be shown.</p>"
    try:
        record = record_stages(detector.model, detector.prepare(image))
    except UserError as error:
        return f"<p>{html.escape(str(error))}</p>"
    page = render_page(
        record, image[:, :, ::-1], choose_queries(record), detector.class_names, "Stages"
    )
    # Scripts in it run, but as a stranger's: out of reach of the page and of the server.
    return f'<iframe sandbox="allow-scripts" title="Stages" srcdoc="{html.escape(page)}"></iframe>'


class Page:
    """What the page shows; gradio calls it for one picture at a time."""

    def __init__(self, detector: Detector):
        self.detector = detector

    def answer(self, data: bytes, threshold: float) -> tuple:
        """What to show for a file: status, picture, table; then what was found, and the stages."""
        begin = time.perf_counter()
        try:
            image = decode_picture(data)
        except UserError as error:
            print(f"refused a file of {len(data)} bytes: {error}", file=sys.stderr, flush=True)
            return refusal(str(error))
        found = detect(self.detector, image)
        described = describe_stages(self.detector, image)
        height, width = image.shape[:2]
        seconds = time.perf_counter() - begin
        print(f"{width} x {height} pixels: {seconds:.1f} s", flush=True)
        return *self.redraw(found, threshold), found, described

    def redraw(self, found: Optional[Found], threshold: float) -> tuple:
        """Status, picture and table with the detections that reach a threshold."""
        if found is None:
            return LIMITS, None, ""
        shown = found.instances[found.instances.scores >= threshold]
        number = len(found.instances)
        status = f"Detections that score {threshold:.2f} or more: {len(shown)} of {number}."
        names = self.detector.class_names
        return status, draw(found, shown, names), table(shown, names)

    def build(self, gradio: ModuleType, checkpoint: str):
        """The page's layout and events, as gradio's Blocks."""
        name, file_name = type(self.detector.model).__name__, "/".join(Path(checkpoint).parts[-2:])
        with gradio.Blocks(title=f"{name} {file_name}", delete_cache=(KEEP // 10, KEEP)) as blocks:
            title = gradio.HTML(
                f"<h2>{name}</h2>{html.escape(file_name)}", js_on_load=WATCH_FILES
            )
            file = gradio.File(label="Picture", type="binary", height=150, elem_id="file")
            status = gradio.HTML(LIMITS, elem_id="status")
            with gradio.Row():
                picture = gradio.Image(
                    label="Detections", interactive=False, scale=2, min_width=320, elem_id="drawn",
                    buttons=["download", "fullscreen"],  # without the one that shares pictures
                )
                with gradio.Column(min_width=320):
                    threshold = gradio.Slider(0, 1, 0.3, step=0.01, label="Least score")
                    detections = gradio.HTML(elem_id="detections")
            stages = gradio.HTML(elem_id="stages")
            found = gradio.State(time_to_live=KEEP)
            outputs = [status, picture, detections]
            everything = [*outputs, found, stages]
            shared = {"concurrency_id": "model", "concurrency_limit": 1}
            title.input(lambda: refusal(TOO_LARGE), None, everything, **shared)
            file.upload(
                self.answer, [file, threshold], everything, **shared
            ).then(lambda: None, None, file)
            threshold.change(
                self.redraw, [found, threshold], outputs, trigger_mode="always_last", **shared
            )
        return blocks


def import_gradio(folder: str) -> ModuleType:
    """Gradio, which keeps its files in a folder and calls nobody. Raises UserError without it."""
    os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"the web page needs {error.name}: pip install -e '.[web]'") from error
    return gradio


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve from; warns unless only this machine reaches it. Raises UserError."""
    try:
        family, *_, (address, *_) = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server((address, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        is_busy = getattr(error, "errno", None) == errno.EADDRINUSE
        hint = ": stop what uses it, or let --port 0 take a free one" if is_busy else ""
        raise UserError(f"cannot listen on {host}, port {port}: {reason}{hint}") from error
    if not ipaddress.ip_address(address).is_loopback:
        print("warning: whoever reaches this machine can use the model: there is no password",
              file=sys.stderr)
    return listening


def serve(blocks, gradio: ModuleType, listening: socket.socket):
    """Serve the page until a signal ends it."""
    import fastapi
    import uvicorn

    app = gradio.mount_gradio_app(
        fastapi.FastAPI(), blocks, "/", css=STYLE, footer_links=[], run_history=False,
        max_file_size=MAX_BYTES, ssr_mode=False,
        # The default one may have its letters from Google.
        theme=gradio.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None):
            app.routes[-1].app.stop_event.set()  # open pages else keep their connections
            await super().shutdown(sockets)

    # Uvicorn, when it has ended, raises the signal again. SIGTERM by itself would leave the folder,
    # and a shell lets what it starts in the background ignore SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    host, port = listening.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port} until Ctrl-C", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10)
    Server(config).run(sockets=[listening])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="default: the checkpoint's own")
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="%(default)s; 0 takes a free one")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="web_demo_") as folder:
            gradio = import_gradio(folder)
            with listen(args.host, args.port) as listening:
                page = Page(load_detector(args.checkpoint, args.config_file, args.overrides))
                blocks = page.build(gradio, args.checkpoint)
                serve(blocks, gradio, listening)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
