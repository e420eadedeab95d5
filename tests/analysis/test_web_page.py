"""Promises of tools/web_demo.py, kept in a real browser against the real server."""

import io
import mimetypes
import os
import re
import signal
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import web_demo
from detectron2.config import instantiate
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageDraw

from projects.stageinteractor.analysis.web import web_page, web_server
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference import load_detector
from support.browser import open_browser, open_page
from support.runs import CONFIG, ROOT, overrides, wait_for

pytestmark = pytest.mark.slow  # a server and a browser: a minute
CLASSES = ["rectangle", "circle", "<b>triangle</b>"]
STATUS, ROWS, DRAWN = "#status .prose", "#detections tbody tr", "#drawn img"


# ---- the server and the browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("web_demo")


@pytest.fixture(scope="module")
def model(folder):
    """Arguments for a model of random weights whose scores spread around 0.5."""
    options = overrides(folder / "none.json", folder)
    torch.manual_seed(1)
    built = instantiate(load_config(str(ROOT / CONFIG), options).model)
    for stage in built.decoder.stages:
        torch.nn.init.normal_(stage.box_head[-1].weight, std=0.05)
        torch.nn.init.normal_(stage.class_head[-1].weight, std=0.3)
        torch.nn.init.zeros_(stage.class_head[-1].bias)
    torch.save({"model": built.state_dict(), "class_names": CLASSES}, folder / "model.pth")
    return [str(ROOT / CONFIG), str(folder / "model.pth"), options]


@pytest.fixture(scope="module")
def outside():
    """Stands for the rest of the world, as a proxy: whoever calls it has called outside."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        yield listening


class Server:
    """The running command: its process, address, log and folder for temporary files."""

    def __init__(self, folder, model, outside):
        pytest.importorskip("gradio", reason="gradio is not installed")
        config, checkpoint, options = model
        self.temporary, self.log_file = folder / "temporary", folder / "log.txt"
        killed = self.temporary / f"{web_server.FOLDER}killed"  # an earlier server, which left this
        killed.mkdir(parents=True)
        for name in (web_server.LOCK, "picture.png"):
            (killed / name).touch()
        proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
        self.process = subprocess.Popen(
            [sys.executable, "tools/web_demo.py", "--config-file", config,
             "--checkpoint", checkpoint, "--port", "0", *options],
            cwd=ROOT, stdout=open(self.log_file, "wb"), stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary),
                 "HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "ALL_PROXY": proxy},
        )

    @property
    def log(self):
        return self.log_file.read_text()

    @property
    def address(self):
        wait_for(lambda: "http://" in self.log, self.process)
        return re.search(r"http://\S+", self.log)[0] + "/"

    @property
    def uploads(self):
        return sorted(file.name for file in self.temporary.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def server(folder, model, outside):
    started = Server(folder, model, outside)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture
def watched(browser, server):
    """The page, freshly loaded. It asks nobody else for anything, and no script of it fails."""
    with open_page(browser, server.address) as opened:
        opened.page.set_default_timeout(60_000)
        opened.page.goto(server.address)
        opened.page.wait_for_selector("input[type=file]", state="attached")
        yield opened
        assert opened.strayed == [] and opened.errors == []


@pytest.fixture(scope="module")
def picture(folder):
    """A photograph that has to be turned, by the name of its file."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 90, (96, 64, 3), dtype=np.uint8))
    ImageDraw.Draw(image).ellipse((8, 20, 50, 60), fill="yellow")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif, quality=95)
    return folder / "turned.jpg"


def drop(page, file):
    """Give the page a file and wait until it is ready for another."""
    before = page.inner_html(STATUS)
    page.set_input_files("input[type=file]", file)
    page.wait_for_function(
        "([status, before]) => document.querySelector(status).innerHTML !== before",
        arg=[STATUS, before],
    )
    page.wait_for_selector("input[type=file]", state="attached")


def drag(page, size):
    """Give the page a file of so many bytes with the mouse."""
    transfer = page.evaluate_handle(
        """size => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(size)], "large.png"));
            return transfer;
        }""", size,
    )
    page.dispatch_event("#file button", "drop", {"dataTransfer": transfer})


def rows(page):
    return [row.inner_text().split("\t") for row in page.query_selector_all(ROWS)]


def is_empty(page):
    """Whether neither detections nor stages of any picture are to be seen."""
    return not any(map(page.query_selector, (ROWS, DRAWN, "#stages iframe")))


def set_threshold(page, value, status=None):
    page.fill("input[type=number]", str(value))
    page.press("input[type=number]", "Enter")
    page.wait_for_function(
        "([status, text]) => document.querySelector(status).innerText.includes(text)",
        arg=[STATUS, status or f"score {value:.2f} or more"],
    )


def test_only_this_machine_can_reach_the_server(server):
    port = int(server.address.strip("/").rpartition(":")[2])
    listening = {
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in open(f"/proc/net/{table}").readlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    }
    assert listening == {f"0100007F:{port:04X}"}
    assert "warning" not in server.log


def test_a_picture_gives_what_the_detector_finds(watched, model, picture):
    drop(watched.page, picture)
    set_threshold(watched.page, 0)
    image = read_image(str(picture), "BGR")
    assert image.shape == (64, 96, 3)
    found = load_detector(model[1], model[0], model[2])(image)
    found = found[found.scores.argsort(descending=True)]
    expected = [
        (CLASSES[index], score, *box[:2], *(box[2:] - box[:2]))
        for index, score, box in zip(
            found.pred_classes, found.scores.tolist(), found.pred_boxes.tensor.numpy()
        )
    ]
    shown = rows(watched.page)
    assert [row[0] for row in shown] == [row[0] for row in expected]
    numbers = np.array([row[1:] for row in shown], float)
    np.testing.assert_allclose(numbers[:, 0], [row[1] for row in expected], atol=0.006)
    np.testing.assert_allclose(numbers[:, 1:], [row[2:] for row in expected], atol=1)
    # The drawn picture has the proportions of the turned one.
    drawn = watched.page.wait_for_selector(DRAWN)
    proportion = drawn.evaluate("image => image.naturalWidth / image.naturalHeight")
    assert proportion == pytest.approx(1.5, rel=0.01)


def test_the_threshold_redraws_without_the_model(watched, server, picture):
    drop(watched.page, picture)
    set_threshold(watched.page, 0)
    runs, drawn = server.log.count("pixels:"), watched.page.get_attribute(DRAWN, "src")
    everything = rows(watched.page)
    scores = [float(row[1]) for row in everything]
    # Between two scores, since those that are shown are rounded.
    count = next(i for i in range(2, len(scores)) if scores[i - 1] - scores[i] >= 0.02)
    set_threshold(watched.page, round(scores[count] + 0.01, 2))
    assert rows(watched.page) == everything[:count]
    assert watched.page.get_attribute(DRAWN, "src") != drawn
    assert server.log.count("pixels:") == runs


def test_the_slider_shows_what_stages_did(watched, picture):
    drop(watched.page, picture)
    frame = watched.page.frame_locator("#stages iframe")
    slider, boxes = frame.locator("#stage"), set()
    for place in range(4):  # before the first of three stages, then after each
        slider.fill(str(place))
        boxes.add(frame.locator("rect.box").first.evaluate("box => box.outerHTML"))
    assert len(boxes) == 4
    # Its scripts are a stranger's to the page around it.
    assert watched.page.query_selector("#stages iframe").get_attribute("sandbox") == "allow-scripts"


# ---- bad files


def in_memory(image, file_format):
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


def huge_file(width=10_000, height=6_000):
    """A small file of 60 million pixels."""
    return in_memory(Image.new("1", (width, height)), "PNG")


def bad_files():
    """Names, contents, and what the page says about them."""
    red, no_picture = Image.new("RGB", (64, 48), "red"), "not an image in one of the formats"
    yield "text.jpg", b"a text", no_picture
    yield "empty.png", b"", no_picture
    yield "README.md", b"# A text", no_picture
    yield "script.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", no_picture
    yield "cut.jpg", in_memory(red, "JPEG")[:-100], "cannot read a picture of"
    yield "cut.png", in_memory(red, "PNG")[:-30], "cannot read a picture of"
    yield "huge.png", huge_file(), "The picture is too large: 50 megapixels at most."


def test_bad_files_are_named_and_the_server_goes_on(watched, server, picture):
    page = watched.page
    for name, content, message in bad_files():
        before = server.log
        drop(page, picture)
        page.wait_for_selector("#stages iframe")
        kind = mimetypes.guess_type(name)[0]
        drop(page, {"name": name, "mimeType": kind, "buffer": content})
        assert message in page.inner_text(f"{STATUS} .error"), name
        assert is_empty(page)
        line, = [line for line in server.log[len(before):].splitlines() if "pixels:" not in line]
        assert line.startswith("refused a file of ") and message in line
    drop(page, picture)
    assert rows(page)


def test_a_file_of_too_many_bytes_takes_the_place_of_what_was_there(
    watched, server, picture, folder
):
    """Of a picture, and of a file that was refused for another reason."""
    large = folder / "large.png"
    large.write_bytes(bytes(web_page.MAX_BYTES + 1))
    text = {"name": "text.jpg", "mimeType": "image/jpeg", "buffer": b"a text"}
    page = watched.page
    for earlier in (picture, text):
        drop(page, earlier)
        drop(page, large)
        assert page.inner_text(f"{STATUS} .error") == "The file is too large: 20 MB at most."
        assert is_empty(page)
    assert "large.png" not in server.uploads
    drop(page, picture)
    drag(page, web_page.MAX_BYTES + 1)
    page.wait_for_selector(f"{STATUS} .error")
    set_threshold(page, 0.1, status=web_page.LIMITS)
    assert is_empty(page)
    drag(page, web_page.MAX_BYTES)
    page.wait_for_selector(f"{STATUS} .error >> text=not an image")
    drop(page, picture)
    assert rows(page)


def test_the_page_is_as_wide_as_the_window_whatever_it_shows(watched, picture):
    page = watched.page
    empty = {"name": "empty.png", "mimeType": "image/png", "buffer": b""}
    for file in (None, empty, picture):
        if file:
            drop(page, file)
        box = page.locator(".gradio-container").bounding_box()
        assert box["width"] == 1200, file  # of 1280


def test_the_server_itself_refuses_many_bytes(server):
    httpx = pytest.importorskip("httpx")
    with httpx.Client(trust_env=False, base_url=server.address) as client:
        large = bytes(web_page.MAX_BYTES + 1)
        answer = client.post("gradio_api/upload", files={"files": ("sent.png", large)})
    assert answer.status_code == 413
    assert "sent.png" not in server.uploads


def test_ctrl_c_ends_an_open_page_and_removes_pictures(watched, server, picture, outside):
    drop(watched.page, picture)
    assert "turned.jpg" in server.uploads
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=60) == 130
    assert list(server.temporary.iterdir()) == []
    assert "Traceback" not in server.log and "ERROR" not in server.log
    with pytest.raises(BlockingIOError):  # nobody has called
        outside.accept()


# ---- without a browser


@pytest.mark.parametrize("size", [(10_000, 6_000), (20_000, 10_000)])
def test_the_size_is_judged_before_pixels_are_decoded(size):
    """Of the second size, Pillow itself would refuse to read the header."""
    with pytest.raises(UserError, match="too large"):
        web_page.picture_size(huge_file(*size)[:60])


def test_a_model_without_stages_says_so():
    detector = types.SimpleNamespace(model=torch.nn.Identity())
    assert "Identity has no decoder" in web_page.describe_stages(detector, None)


def test_other_hosts_bring_a_warning(capsys):
    web_server.listen("127.0.0.1", 0).close()
    assert capsys.readouterr().err == ""
    web_server.listen("0.0.0.0", 0).close()
    assert "there is no password" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mistake, message",
    [
        ("taken", "cannot listen on 127.0.0.1, port .*"),
        ("no port", "cannot listen on 127.0.0.1, port 99999: .*"),
        ("no gradio", r".*: pip install -e '\.\[web\]'"),
    ],
)
def test_mistakes_end_with_one_line(monkeypatch, outside, mistake, message):
    taken = outside.getsockname()[1]
    port = {"taken": taken, "no port": 99_999}.get(mistake, 0)
    if mistake == "no gradio":
        monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as ended:
        web_demo.main(["--config-file", CONFIG, "--checkpoint", "none.pth", "--port", str(port)])
    assert re.fullmatch(f"error: {message}", str(ended.value))
