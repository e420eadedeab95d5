#!/usr/bin/env python
"""A web page to try a model: drop a picture, see its detections and what every stage did.

    pip install -e '.[web]'
    python tools/web_demo.py [--config-file FILE] --checkpoint FILE [--host 127.0.0.1] \\
        [--port 7860] [key=value ...]

The page is for this machine alone unless --host says otherwise; there is no password. On this
machine, it answers only requests that name this machine, so that other web pages cannot use it
through somebody's browser. Neither the server nor the page calls anybody else. Pictures may be
private: they lie in a temporary folder that only its user may read, for about ten minutes each. The
folder is removed when the server ends; if the server was killed, at the next start.
"""

import argparse
import contextlib
import fcntl
import errno
import html
import ipaddress
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from collections.abc import Collection, Iterator
from urllib.parse import urlsplit

import _start  # noqa: F401
import numpy as np
from detectron2.structures import Instances
from PIL import Image

from projects.stageinteractor.data import open_image, read_picture
from projects.stageinteractor.data.reading import name_of, reason_of
from projects.stageinteractor.config.device import is_out_of_memory
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference import Detector, load_detector
from projects.stageinteractor.modeling import StageInteractor
from projects.stageinteractor.drawing.detections import class_metadata, draw_detections
from projects.stageinteractor.analysis.stage_page import render_page
from projects.stageinteractor.analysis.stage_record import choose_queries, record_stages

MAX_BYTES, MAX_MEGAPIXELS = 20 * 2**20, 50
LIMITS = f"A picture may have {MAX_BYTES // 2**20} MB and {MAX_MEGAPIXELS} megapixels."
TOO_LARGE = f"The file is too large: {MAX_BYTES // 2**20} MB at most."
# Memory that an answer takes, as measured with R50, Swin-S, lite0 and others: bytes at most, plus
# those for a pixel of the network's input, plus those for a pixel of the picture.
BYTES, BYTES_PER_INPUT_PIXEL, BYTES_PER_PIXEL = 400e6, 400, 30
NO_MEMORY = "There is too little memory for this picture: try a smaller one."
SIDE = 1000  # pixels of the longer side of what is drawn on, which sets the size of letters
KEEP = 600  # seconds that files stay
FOLDER = "stageinteractor_web_"  # how the name of the folder for pictures begins
LOCK = "lock"  # file in it that a living server holds
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
MAX_REQUEST = 2**20  # bytes, but for uploads
UPLOAD = "/gradio_api/upload"
# All that the page asks for. Gradio's server offers more: it fetches addresses, for example.
ROUTES = (
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static|svelte)/.+|/gradio_api/"
    r"(info|theme\.css|startup-events|app_id|queue/(join|data)|heartbeat/\w+|cancel|reset|upload|"
    r"upload_progress|file={folder}/.+)"
)
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
        if (event.target.closest("#file") && files[0]?.size > MAX_BYTES) trigger("input");
    }, true);
""".replace("MAX_BYTES", str(MAX_BYTES))


def refusal(reason: str) -> tuple:
    """What the page shows instead of an answer."""
    return f'<p class="error">{html.escape(reason)}</p>', None, "", None, ""


class Found(NamedTuple):
    """What a model has found in a picture, with boxes in pixels of the picture that was given."""

    picture: np.ndarray  # RGB, resized so that its longer side is SIDE
    scale: float  # of that to the picture that was given
    instances: Instances  # on the CPU, best first, as models give them


def free_memory() -> float:
    """Bytes that this process may still take; infinity where the system does not tell."""
    free = math.inf
    with contextlib.suppress(OSError):
        meminfo = Path("/proc/meminfo").read_text()
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", meminfo)[1])
    with contextlib.suppress(OSError, ValueError):  # without a limit, that is the word "max"
        name = Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        group = Path("/sys/fs/cgroup", name)
        limit, used = (int((group / f"memory.{of}").read_text()) for of in ("max", "current"))
        cached = re.search(r"inactive_file (\d+)", (group / "memory.stat").read_text())[1]
        free = min(free, limit - used + int(cached))
    return free


def memory_needed(detector: Detector, height: float, width: float) -> float:
    """Estimate of the bytes that it takes to answer for a picture of a size, in pixels."""
    resized = detector.input_size(math.ceil(height), math.ceil(width))
    pixels = BYTES_PER_INPUT_PIXEL * math.prod(resized) + BYTES_PER_PIXEL * height * width
    return BYTES + pixels


def check_size(detector: Detector, height: int, width: int):
    """Raises UserError if a picture of this size in pixels takes more memory than is free."""
    free = free_memory()
    if memory_needed(detector, height, width) <= free:
        return
    for scale in np.arange(0.98, 0, -0.02):
        if memory_needed(detector, scale * height, scale * width) <= free:
            raise UserError(
                "The picture is too large for the memory that is free: "
                f"{scale**2 * height * width / 1e6:.1f} megapixels at most."
            )
    raise UserError(NO_MEMORY)


def picture_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels that the header of a file tells.

    Raises:
        UserError: it is not a picture, or has too many pixels.
    """
    try:
        with open_image(data) as image:
            width, height = image.size
        if width * height > MAX_MEGAPIXELS * 1e6:
            raise Image.DecompressionBombError
    except Image.DecompressionBombError:
        raise UserError(f"The picture is too large: {MAX_MEGAPIXELS} megapixels at most.")
    except Exception as error:  # Pillow's readers raise all sorts
        raise UserError(f"cannot read {name_of(data)}: {reason_of(error)}")
    return height, width


def decode_picture(data: bytes) -> np.ndarray:
    """The picture in a file, see `data.reading.decode`: (H, W, 3), BGR, uint8.

    Raises:
        UserError: it is not a picture, broken, or has too many pixels, which are then not decoded.
    """
    picture_size(data)
    return read_picture(data, "BGR")


def detect(detector: Detector, image: np.ndarray) -> Found:
    """The detections of a model in a picture (H, W, 3), BGR, uint8."""
    instances = detector(image)
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1])).resize(size)
    return Found(np.asarray(picture), scale, instances)


def draw(found: Found, shown: Instances, class_names: list[str]) -> np.ndarray:
    """The picture with some of its detections, RGB."""
    boxes = shown.pred_boxes.clone()
    boxes.scale(found.scale, found.scale)
    scaled = Instances(found.picture.shape[:2], **{**shown.get_fields(), "pred_boxes": boxes})
    return draw_detections(found.picture, scaled, class_metadata(class_names))


def table(instances: Instances, class_names: list[str]) -> str:
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
            check_size(self.detector, *picture_size(data))
            image = decode_picture(data)
            found, described = self.look_at(image)
        except UserError as error:
            print(f"refused a file of {len(data)} bytes: {error}", file=sys.stderr, flush=True)
            return refusal(str(error))
        height, width = image.shape[:2]
        seconds = time.perf_counter() - begin
        print(f"{width} x {height} pixels: {seconds:.1f} s", flush=True)
        return *self.redraw(found, threshold), found, described

    def look_at(self, image: np.ndarray) -> tuple[Found, str]:
        """What is found in a picture (H, W, 3), BGR, uint8, and what the stages did, as HTML.

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


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """A new folder for visitors' pictures, which goes in the end, as do those of dead servers."""
    for lock in Path(tempfile.gettempdir()).glob(f"{FOLDER}*/{LOCK}"):
        with contextlib.suppress(OSError):
            if os.lstat(lock.parent).st_uid == os.getuid():
                with open(lock) as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while a server lives
                    shutil.rmtree(lock.parent)  # fails for a link, too
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder:
        new = Path(folder, f"{LOCK}.new")
        with open(new, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            new.rename(Path(folder, LOCK))  # now that it is held
            yield os.path.realpath(folder)


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


class Guard:
    """Answers for an ASGI application what it shall not be asked.

    Args:
        app: the application.
        folder: with visitors' files, the only ones that a request may name.
        hosts: names that a request may call this machine by, None for any. A web page somewhere
            else can make a browser send requests, under its own name or as a foreign origin.
    """

    def __init__(self, app, folder: str, hosts: Collection[str] | None):
        self.app, self.folder, self.hosts = app, folder, hosts
        self.routes = re.compile(ROUTES.format(folder=re.escape(folder)))

    async def __call__(self, scope, receive, send):
        from starlette.responses import PlainTextResponse

        reason = None
        if scope["type"] == "http":
            reason = self.reason_against(scope)
            if not reason and scope["method"] == "POST" and scope["path"] != UPLOAD:
                body = await read_body(receive)
                reason = self.reason_against_files(body)
                unread = iter([{"type": "http.request", "body": body}])
                read, receive = receive, lambda: read_again(unread, read)
        answer = PlainTextResponse(reason, 403) if reason else self.app
        await answer(scope, receive, send)

    def reason_against(self, scope: dict) -> str | None:
        """Why a request is refused whatever it holds, or None."""
        if not self.routes.fullmatch(scope["path"]):
            return "This page does not offer that."
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self.hosts is not None and (
            host_name(f"//{host}") not in self.hosts or origin and without_scheme(origin) != host
        ):
            return "This page is for this machine alone: open it by the address that it prints."

    def reason_against_files(self, body: bytes) -> str | None:
        """Why a request's content in JSON is refused, or None."""
        objects = []
        try:
            json.loads(body, object_hook=objects.append)
        except (ValueError, RecursionError):
            return "That is not a request of this page."
        for item in objects:
            path, address = item.get("path"), item.get("url")
            if "path" in item and not self.is_visitors(path) or address and not (
                isinstance(address, str) and address.endswith(f"/gradio_api/file={path}")
            ):
                return "A picture comes from the page's own upload."

    def is_visitors(self, path: object) -> bool:
        """Whether it is a path to a file in the folder, told without looking whether there is one.

        Gradio checks it again, with links resolved.
        """
        return (
            isinstance(path, str) and path.startswith(self.folder + os.sep)
            and os.path.normpath(path) == path
        )


def host_name(address: str) -> str | None:
    """The host in an address, or None."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def without_scheme(origin: str) -> str:
    return origin.partition("://")[2]


async def read_body(receive) -> bytes:
    """The content of a request; of a longer one than the page sends, what cannot be JSON."""
    body, more = b"", True
    while more and len(body) <= MAX_REQUEST:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body if not more else b""


async def read_again(unread: Iterator[dict], receive) -> dict:
    """Messages that have been read already, then those that follow."""
    return next(unread, None) or await receive()


def make_app(blocks, gradio: ModuleType, folder: str, hosts: Collection[str] | None) -> Guard:
    """The page as an ASGI application, see `Guard`."""
    import fastapi

    app = gradio.mount_gradio_app(
        fastapi.FastAPI(), blocks, "/", css=STYLE, footer_links=[], run_history=False,
        max_file_size=MAX_BYTES, ssr_mode=False,
        # The default one may have its letters from Google.
        theme=gradio.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),
    )

    # Gradio allows any file of this machine as a picture until it is launched, which an application
    # that is mounted never is.
    blocks.has_launched = True
    return Guard(app, folder, hosts)


def serve(app: Guard, listening: socket.socket):
    """Serve the page until a signal ends it."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None):
            app.app.routes[-1].app.stop_event.set()  # open pages else keep their connections
            await super().shutdown(sockets)

    # Uvicorn, when it has ended, raises the signal again. SIGTERM by itself would leave the folder,
    # and a shell lets what it starts in the background ignore SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup: a terminal has gone
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
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
        with private_folder() as folder:
            gradio = import_gradio(folder)
            with listen(args.host, args.port) as listening:
                page = Page(load_detector(args.checkpoint, args.config_file, args.overrides))
                blocks = page.build(gradio, args.checkpoint)
                is_local = ipaddress.ip_address(listening.getsockname()[0]).is_loopback
                hosts = {*THIS_MACHINE, args.host.lower()} if is_local else None
                serve(make_app(blocks, gradio, folder, hosts), listening)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
