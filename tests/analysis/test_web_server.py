"""What the web page's server answers to clients that are not its page, over HTTP."""

import io
import json
import math
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from PIL import Image

from projects.stageinteractor.analysis.web import web_page, web_server
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference import Detector
from support.runs import ROOT

pytest.importorskip("gradio", reason="gradio is not installed")
httpx = pytest.importorskip("httpx")


def find_one(batch):
    """In place of a model: a box that covers each picture."""
    for item in batch:
        size = item["height"], item["width"]
        box = torch.tensor([[0.0, 0.0, size[1], size[0]]])
        yield {"instances": Instances(
            size, pred_boxes=Boxes(box), scores=torch.tensor([0.9]), pred_classes=torch.tensor([0])
        )}


@pytest.fixture
def detector():
    return Detector(lambda batch: [*find_one(batch)], [], "RGB", [{"id": 1, "name": "cat"}])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return os.path.realpath(tmp_path_factory.mktemp("visitors"))


@pytest.fixture(scope="module")
def server(folder):
    """Address of the page, with everything that stands between a client and the model."""
    import uvicorn

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(name, "")  # so that they are put back
        gradio = web_server.import_gradio(folder)
        detector = Detector(lambda batch: [*find_one(batch)], [], "RGB", [{"id": 1, "name": "cat"}])
        blocks = web_page.Page(detector).build(gradio, "run/model.pth")
        app = web_server.make_app(blocks, gradio, folder, web_server.THIS_MACHINE)
        with web_server.listen("127.0.0.1", 0) as listening:
            running = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
            thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
            thread.start()
            try:
                yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            finally:
                app.app.routes[-1].app.stop_event.set()
                running.should_exit = True
                thread.join()


@pytest.fixture
def client(server):
    with httpx.Client(trust_env=False, base_url=server, timeout=20) as opened:
        yield opened


@pytest.fixture
def picture():
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "PNG")
    return file.getvalue()


def join(client, data, fn_index, session="abc"):
    """A client's request for an event."""
    return client.post("/gradio_api/queue/join", json={
        "data": data, "fn_index": fn_index, "session_hash": session, "event_data": None,
    })


def ask(client, data, fn_index):
    """The answer of the queue to an event: its last message."""
    session = os.urandom(4).hex()
    assert join(client, data, fn_index, session).status_code == 200
    with client.stream(
        "GET", "/gradio_api/queue/data", params={"session_hash": session}
    ) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data:") or "{}")
            if message.get("msg") in ("process_completed", "unexpected_error"):
                return message
    raise AssertionError("no answer")


@pytest.fixture
def answering(client):
    """The index of the function that takes a file."""
    found = client.get("/config").json()["dependencies"]
    index, = (
        item["id"] for item in found if (len(item["inputs"]), len(item["outputs"])) == (2, 5)
    )
    return index


def file_data(path, **fields):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **fields}


def test_a_picture_that_was_uploaded_is_answered(client, answering, picture):
    """And the answer's picture can be fetched: all that is refused below would work like this."""
    path, = client.post("/gradio_api/upload", files={"files": ("a.png", picture)}).json()
    answer = ask(client, [file_data(path), 0.3], answering)
    assert answer["success"], answer
    status, drawn, table = answer["output"]["data"][:3]
    assert "1 of 1" in status and "cat" in table
    got = client.get(drawn["url"] if "://" in drawn["url"] else f"/gradio_api/file={drawn['path']}")
    assert got.status_code == 200 and Image.open(io.BytesIO(got.content)).width == web_page.SIDE


@pytest.mark.parametrize("form", [
    "plain", "without meta", "stream", "with address", "list", "dots", "relative",
])
@pytest.mark.parametrize("kind", ["picture", "other", "missing", "device"])
def test_files_of_the_server_are_refused(
    client, answering, picture, folder, tmp_path, form, kind
):
    """Whatever they are, with the same words, and without a copy."""
    (tmp_path / "secret.png").write_bytes(picture)
    (tmp_path / "secret.txt").write_bytes(b"a secret")
    path = {"picture": tmp_path / "secret.png", "other": tmp_path / "secret.txt",
            "missing": tmp_path / "none.png", "device": Path("/dev/zero")}[kind]
    given = {
        "plain": file_data(path),
        "without meta": {"path": str(path)},
        "stream": file_data(path, is_stream=True),
        "with address": file_data(path, url=f"/gradio_api/file={path}", orig_name="a.png"),
        "list": [file_data(path)],
        "dots": file_data(f"{folder}/x/../../{os.path.relpath(path, Path(folder).parent)}"),
        "relative": file_data(os.path.relpath(path)),
    }[form]
    before = sorted(Path(folder).rglob("*"))
    for data in ([given, 0.3], [None, given], [{"a": [given]}, 0.3]):
        refused = join(client, data, answering)
        assert refused.status_code == 403 and "own upload" in refused.text
    assert sorted(Path(folder).rglob("*")) == before


def test_gradio_itself_refuses_what_a_link_leads_to(
    client, answering, picture, folder, tmp_path
):
    """As it does with all files of the server since it counts as launched."""
    (tmp_path / "secret.png").write_bytes(picture)
    (Path(folder) / "linked").symlink_to(tmp_path)
    answer = ask(client, [file_data(f"{folder}/linked/secret.png"), 0.3], answering)
    assert not answer["success"] and "not uploaded by a user" in json.dumps(answer)
    (Path(folder) / "linked").unlink()


@pytest.mark.parametrize("body", [
    b"", b"{", b"\xff", b"[" * 100_000, b'{"a": "' + bytes(web_server.MAX_REQUEST) + b'"}',
])
def test_what_is_not_json_is_refused(client, body):
    for content in (body, iter([body])):  # of a length that is told, and in chunks
        assert client.post("/gradio_api/queue/join", content=content).status_code == 403


@pytest.mark.parametrize("place", ["file", "threshold"])
@pytest.mark.parametrize("address", [
    "http://127.0.0.1:{}/", "http://localhost:{}/a.png", "https://h.invalid"
])
def test_no_address_is_fetched(client, answering, folder, place, address):
    with web_server.listen("127.0.0.1", 0) as outside:
        outside.settimeout(0)
        address = address.format(outside.getsockname()[1])
        for given in (file_data(address), file_data(f"{folder}/a.png", url=address),
                      file_data(address, is_stream=True), {"url": address}):
            data = [given, 0.3] if place == "file" else [None, given]
            assert join(client, data, answering).status_code == 403
        for route in (f"file={address}", f"proxy={address}"):
            assert client.get(f"/gradio_api/{route}").status_code == 403
        with pytest.raises(BlockingIOError):
            outside.accept()


@pytest.mark.parametrize("route", [
    "call/answer", "call/v2/answer", "run/answer", "api/answer", "run/predict", "api/predict",
    "component_server", "process_recording", "stream/abc", "vibe-edit",
])
def test_other_ways_in_are_closed(client, tmp_path, picture, route):
    (tmp_path / "secret.png").write_bytes(picture)
    body = {"data": [file_data(tmp_path / "secret.png"), 0.3], "session_hash": "abc", "fn_index": 0}
    assert client.post(f"/gradio_api/{route}", json=body).status_code == 403


def test_only_visitors_files_are_handed_out(client, folder, tmp_path):
    (tmp_path / "secret.txt").write_text("a secret")
    (Path(folder) / "link").symlink_to(tmp_path)
    for path in (tmp_path / "secret.txt", ROOT / "README.md", f"{folder}/../secret.txt",
                 f"{folder}/%2e%2e/secret.txt", f"{folder}/link/secret.txt", "/dev/zero",
                 f"{folder}/none", "../../etc/passwd"):
        got = client.get(f"/gradio_api/file={path}")
        assert got.status_code == 403 and "a secret" not in got.text, path
    (Path(folder) / "link").unlink()


@pytest.mark.parametrize("headers, is_answered", [
    ({}, True),
    ({"Host": "localhost:7860"}, True),
    ({"Host": "[::1]:7860"}, True),
    ({"Host": "LOCALHOST"}, True),
    ({"Host": "rebound.example:7860"}, False),
    ({"Host": "127.0.0.1.rebound.example"}, False),
    ({"Host": "localhost@rebound.example"}, False),
    ({"Host": "[::1"}, False),
    ({"Host": ""}, False),
    ({"Host": "localhost:7860", "Origin": "http://localhost:7860"}, True),
    ({"Host": "localhost:7860", "Origin": "http://localhost:8888"}, False),
    ({"Origin": "http://other.example"}, False),
    ({"Origin": "null"}, False),
], ids=str)
def test_requests_name_this_machine(client, headers, is_answered):
    expected = 200 if is_answered else 403
    assert client.get("/", headers=headers).status_code == expected
    if not is_answered:
        assert client.post("/gradio_api/reset", json={}, headers=headers).status_code == 403


def test_other_addresses_answer_to_any_name():
    guard = web_server.Guard(None, "folder", hosts=None)
    scope = {"path": "/", "headers": [(b"host", b"a.example"), (b"origin", b"http://b.example")]}
    assert guard.reason_against(scope) is None


# ---- memory


def png(width, height):
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("augmentations, megapixels", [
    ([], 1e9 / (web_page.BYTES_PER_INPUT_PIXEL + web_page.BYTES_PER_PIXEL) / 1e6),
    ([T.ResizeShortestEdge(400, 600)], 1e9 / web_page.BYTES_PER_PIXEL / 1e6),
    ([T.Resize((500, 500))], 1e9 / web_page.BYTES_PER_PIXEL / 1e6),
])
def test_what_does_not_fit_into_memory_is_refused_before_it_is_decoded(
    detector, monkeypatch, augmentations, megapixels
):
    """With the size that would do, where there is a gigabyte for pixels."""
    monkeypatch.setattr(web_page, "free_memory", lambda: web_page.BYTES + 1e9)
    monkeypatch.setattr(web_page, "read_picture", lambda *_: 1 / 0)
    detector.augmentations = T.AugmentationList(augmentations)
    for width, height in ((1000, 900), (5000, 2000), (8000, 6000), (40_000, 400)):
        data = png(width, height)[:60]
        if width * height < 0.8 * megapixels * 1e6:
            with pytest.raises(ZeroDivisionError):
                web_page.Page(detector).answer(data, 0.3)
            continue
        said = web_page.Page(detector).answer(data, 0.3)[0]
        told = float(re.search(r"([\d.]+) megapixels at most", said)[1])
        assert 0.8 * megapixels < told <= megapixels + 0.05


def test_input_sizes_are_those_of_prepared_pictures(detector):
    for augmentations in ([], [T.ResizeShortestEdge(40, 60)], [T.Resize((30, 50)), T.Resize(20)]):
        detector.augmentations = T.AugmentationList(augmentations)
        for size in ((30, 90), (90, 30), (100, 100)):
            prepared = detector.prepare(np.zeros((*size, 3), np.uint8))["image"]
            padded = tuple(math.ceil(side / 32) * 32 for side in prepared.shape[1:])
            assert detector.input_size(*size) == padded


def test_padding_counts(detector, monkeypatch):
    """A thread of a megapixel is padded to 32 of them."""
    monkeypatch.setattr(web_page, "free_memory", lambda: web_page.BYTES + 1e9)
    with pytest.raises(UserError, match="megapixels at most"):
        web_page.check_size(detector, 1, 1_000_000)


def test_no_size_is_named_where_none_would_do(detector, monkeypatch):
    monkeypatch.setattr(web_page, "free_memory", lambda: web_page.BYTES / 2)
    with pytest.raises(UserError, match="too little memory"):
        web_page.check_size(detector, 8, 8)


def test_free_memory_is_what_linux_and_the_container_leave():
    if not Path("/proc/meminfo").is_file():
        assert web_page.free_memory() == math.inf
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert 0 < web_page.free_memory() <= total


def test_memory_that_ends_is_told(detector, picture, monkeypatch):
    def run_out(batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    detector.model = run_out
    assert web_page.NO_MEMORY in web_page.Page(detector).answer(picture, 0.3)[0]
    detector.model = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        web_page.Page(detector).answer(picture, 0.3)


# ---- what stays


def test_pictures_of_a_killed_server_go_at_the_next_start(tmp_path, monkeypatch):
    """Those of a living server stay, as does what belongs to somebody else."""
    monkeypatch.setattr(web_server.tempfile, "tempdir", str(tmp_path))
    killed, unlocked, other = (tmp_path / name for name in (
        f"{web_server.FOLDER}killed", f"{web_server.FOLDER}unlocked", "other"
    ))
    for folder in (killed, unlocked, other):
        (folder / "of a visitor").mkdir(parents=True)
    for folder in (killed, other):
        (folder / web_server.LOCK).touch()
    (tmp_path / f"{web_server.FOLDER}link").symlink_to(other)
    with web_server.private_folder() as living:
        assert not killed.exists()
        (Path(living) / "picture.png").touch()
        with web_server.private_folder() as second:
            assert (Path(living) / "picture.png").is_file()
            assert os.stat(second).st_mode & 0o077 == 0
    assert sorted(tmp_path.iterdir()) == [
        other, tmp_path / f"{web_server.FOLDER}link", unlocked
    ]
    assert all((folder / "of a visitor").is_dir() for folder in (unlocked, other))
