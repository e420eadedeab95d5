"""What the web page of a model shows: a picture's detections, and what every stage did."""

import contextlib
import html
import math
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from detectron2.structures import Instances
from PIL import Image
from tabulate import tabulate

from ...config.device import is_out_of_memory
from ...data import open_image, read_picture
from ...data.reading import name_of, reason_of
from ...drawing.detections import class_metadata, draw_detections
from ...errors import UserError
from ...inference import Detector
from ...modeling import StageInteractor
from ..stages.stage_page import render_page
from ..stages.stage_record import choose_queries, record_stages

MAX_BYTES, MAX_MEGAPIXELS = 20 * 2**20, 50
LIMITS = f"A picture may have {MAX_BYTES // 2**20} MB and {MAX_MEGAPIXELS} megapixels."
TOO_LARGE = f"The file is too large: {MAX_BYTES // 2**20} MB at most."
# Memory that an answer takes, measured with R50, Swin-S, lite0 and others: at most these bytes,
# plus those for each pixel of the network's input, plus those for each pixel of the picture.
BYTES, BYTES_PER_INPUT_PIXEL, BYTES_PER_PIXEL = 400e6, 400, 30
NO_MEMORY = "There is too little memory for this picture: try a smaller one."
SIDE = 1000  # pixels of the longer side of drawn pictures, so that letters have one size
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
# Gradio refuses large files in the browser with a message that disappears, and without an event.
WATCH_FILES = """
for (const name of ["change", "drop"])
    document.addEventListener(name, event => {
        const {files} = event.dataTransfer ?? event.target;
        if (event.target.closest("#file") && files[0]?.size > MAX_BYTES) trigger("input");
    }, true);
""".replace("MAX_BYTES", str(MAX_BYTES))


class Found(NamedTuple):
    """What a model has found in a picture; instances are on the CPU, best first."""

    picture: np.ndarray  # RGB, resized so that its longer side is SIDE
    drawn: Instances  # boxes in pixels of the resized picture
    instances: Instances  # boxes in pixels of the picture that was given


def refusal(reason: str) -> tuple:
    """Return what the page shows instead of an answer."""
    return f'<p class="error">{html.escape(reason)}</p>', None, "", None, ""


def free_memory() -> float:
    """Return the bytes that this process may still take; infinity if the system does not tell."""
    free = math.inf
    with contextlib.suppress(OSError):
        meminfo = Path("/proc/meminfo").read_text()
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", meminfo)[1])
    with contextlib.suppress(OSError, ValueError):  # without a limit it is the word "max"
        name = Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        group = Path("/sys/fs/cgroup", name)
        limit, used = (int((group / f"memory.{of}").read_text()) for of in ("max", "current"))
        cached = re.search(r"inactive_file (\d+)", (group / "memory.stat").read_text())[1]
        free = min(free, limit - used + int(cached))
    return free


def memory_needed(detector: Detector, height: float, width: float) -> float:
    """Estimate the bytes that an answer takes for a picture of this size in pixels."""
    resized = detector.input_size(math.ceil(height), math.ceil(width))
    pixels = BYTES_PER_INPUT_PIXEL * math.prod(resized) + BYTES_PER_PIXEL * height * width
    return BYTES + pixels


def check_size(detector: Detector, height: int, width: int):
    """Raise UserError if a picture of this size in pixels takes more memory than is free."""
    free = free_memory()
    for scale in np.arange(1, 0, -0.02):
        if memory_needed(detector, scale * height, scale * width) <= free:
            if scale == 1:
                return
            raise UserError(
                "The picture is too large for the memory that is free: "
                f"{scale**2 * height * width / 1e6:.1f} megapixels at most."
            )
    raise UserError(NO_MEMORY)


def picture_size(data: bytes) -> tuple[int, int]:
    """Read height and width in pixels from the header of a file; pixels are not decoded.

    Raises:
        UserError: it is not a picture, or has too many pixels.
    """
    try:
        with open_image(data) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width = height = math.inf
    except Exception as error:  # Pillow's readers raise errors of many kinds
        raise UserError(f"cannot read {name_of(data)}: {reason_of(error)}") from error
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise UserError(f"The picture is too large: {MAX_MEGAPIXELS} megapixels at most.")
    return height, width


def detect(detector: Detector, image: np.ndarray) -> Found:
    """Run a model on a picture (H, W, 3), BGR, uint8."""
    instances = detector(image)
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = np.asarray(Image.fromarray(np.ascontiguousarray(image[:, :, ::-1])).resize(size))
    boxes = instances.pred_boxes.clone()
    boxes.scale(scale, scale)
    drawn = Instances(picture.shape[:2], **{**instances.get_fields(), "pred_boxes": boxes})
    return Found(picture, drawn, instances)


def table(instances: Instances, class_names: list[str]) -> str:
    """Render detections as an HTML table."""
    rows = []
    boxes = instances.pred_boxes.tensor.tolist()
    for box, score, index in zip(boxes, instances.scores.tolist(), instances.pred_classes):
        x1, y1, x2, y2 = map(round, box)
        rows.append([class_names[index], score, x1, y1, x2 - x1, y2 - y1])
    header = ["class", "score", "x", "y", "width", "height"]
    return tabulate(rows, header, "html", floatfmt=".2f", disable_numparse=[0])


def describe_stages(detector: Detector, image: np.ndarray) -> str:
    """Render what every stage did, or why that is not known, as HTML."""
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
    # Its scripts run as a stranger's: they reach neither this page nor the server.
    return f'<iframe sandbox="allow-scripts" title="Stages" srcdoc="{html.escape(page)}"></iframe>'


class Page:
    """Answers the page's events; gradio calls it for one picture at a time."""

    def __init__(self, detector: Detector):
        self.detector = detector
        self.metadata = class_metadata(detector.class_names)

    def answer(self, data: bytes, threshold: float) -> tuple:
        """Return what to show for a file: status, picture, table; then its `Found`, and stages."""
        begin = time.perf_counter()
        try:
            check_size(self.detector, *picture_size(data))
            image = read_picture(data, "BGR")
            found, described = self.look_at(image)
        except UserError as error:
            print(f"refused a file of {len(data)} bytes: {error}", file=sys.stderr, flush=True)
            return refusal(str(error))
        height, width = image.shape[:2]
        seconds = time.perf_counter() - begin
        print(f"{width} x {height} pixels: {seconds:.1f} s", flush=True)
        return *self.redraw(found, threshold), found, described

    def look_at(self, image: np.ndarray) -> tuple[Found, str]:
        """Run the model on a picture (H, W, 3), BGR, uint8; the stages are HTML.

        Raises:
            UserError: there is too little memory.
        """
        try:
            return detect(self.detector, image), describe_stages(self.detector, image)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise UserError(NO_MEMORY) from error
            raise

    def redraw(self, found: Found | None, threshold: float) -> tuple:
        """Return status, picture and table with the detections that reach a threshold."""
        if found is None:
            return LIMITS, None, ""
        reach = found.instances.scores >= threshold
        shown, number = found.instances[reach], len(found.instances)
        status = f"Detections that score {threshold:.2f} or more: {len(shown)} of {number}."
        picture = draw_detections(found.picture, found.drawn[reach], self.metadata)
        return status, picture, table(shown, self.detector.class_names)

    def build(self, gradio: ModuleType, checkpoint: str):
        """Build the page's layout and events, as gradio's Blocks."""
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
