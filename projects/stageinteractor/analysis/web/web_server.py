"""The web page's server: it answers its own page only, calls nobody and keeps files private."""

import contextlib
import errno
import fcntl
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

from ...errors import UserError
from .web_page import MAX_BYTES, STYLE

FOLDER = "stageinteractor_web_"  # begins the name of the folder for pictures
LOCK = "lock"  # a file in it that a living server holds
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
MAX_REQUEST = 2**20  # bytes of a request that is not an upload
UPLOAD = "/gradio_api/upload"
# All that the page asks for. Gradio's server offers more; for example, it fetches addresses.
ROUTES = (
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static|svelte)/.+|/gradio_api/"
    r"(info|theme\.css|startup-events|app_id|queue/(join|data)|heartbeat/\w+|cancel|reset|upload|"
    r"upload_progress|file={folder}/.+)"
)


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """Make a folder for visitors' pictures and remove it in the end, as those of dead servers."""
    for lock in Path(tempfile.gettempdir()).glob(f"{FOLDER}*/{LOCK}"):
        with contextlib.suppress(OSError):
            if os.lstat(lock.parent).st_uid == os.getuid():
                with open(lock) as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while a server lives
                    shutil.rmtree(lock.parent)  # fails for a link as well
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder:
        new = Path(folder, f"{LOCK}.new")
        with open(new, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            new.rename(Path(folder, LOCK))  # now that it is held
            yield os.path.realpath(folder)


def import_gradio(folder: str) -> ModuleType:
    """Import gradio so that it keeps its files in a folder and calls nobody.

    Raises:
        UserError: it is not installed.
    """
    os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"the web page needs {error.name}: pip install -e '.[web]'") from error
    return gradio


def listen(host: str, port: int) -> socket.socket:
    """Open a socket to serve from; print a warning unless only this machine can reach it.

    Raises:
        UserError: the address or the port cannot be used.
    """
    try:
        family, *_, (address, *_) = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server((address, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        is_busy = getattr(error, "errno", None) == errno.EADDRINUSE
        hint = ": stop the program that uses it, or let --port 0 choose" if is_busy else ""
        raise UserError(f"cannot listen on {host}, port {port}: {reason}{hint}") from error
    if not ipaddress.ip_address(address).is_loopback:
        print("warning: anybody who reaches this machine can use the model: there is no password",
              file=sys.stderr)
    return listening


class Guard:
    """Refuses requests that an ASGI application should not see.

    Args:
        app: the application.
        folder: of visitors' files, the only ones that a request may name.
        hosts: names by which a request may address this machine, None for any. A foreign web page
            can make a browser send requests, under its own name or from its own origin.
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
        """Return why a request is refused because of its path and headers, or None."""
        if not self.routes.fullmatch(scope["path"]):
            return "This page does not offer that."
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self.hosts is not None and (
            host_name(f"//{host}") not in self.hosts
            or origin and origin.partition("://")[2] != host
        ):
            return "This page is for this machine only: open it by the address that it prints."

    def reason_against_files(self, body: bytes) -> str | None:
        """Return why a request is refused because of its content, which must be JSON, or None."""
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
                return "A picture must come from the page's own upload."

    def is_visitors(self, path: object) -> bool:
        """Return whether it is a path into the folder, without looking whether the file exists.

        Gradio checks it again, with links resolved.
        """
        return (
            isinstance(path, str) and path.startswith(self.folder + os.sep)
            and os.path.normpath(path) == path
        )


def host_name(address: str) -> str | None:
    """Return the host in an address, or None."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


async def read_body(receive) -> bytes:
    """Read the content of a request. Content longer than the page's becomes empty: not JSON."""
    body, more = b"", True
    while more and len(body) <= MAX_REQUEST:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body if not more else b""


async def read_again(unread: Iterator[dict], receive) -> dict:
    """Return messages that have been read already, then those that follow."""
    return next(unread, None) or await receive()


def make_app(blocks, gradio: ModuleType, folder: str, hosts: Collection[str] | None) -> Guard:
    """Make an ASGI application of the page, see `Guard`."""
    import fastapi

    app = gradio.mount_gradio_app(
        fastapi.FastAPI(), blocks, "/", css=STYLE, footer_links=[], run_history=False,
        max_file_size=MAX_BYTES, ssr_mode=False,
        # The fonts of the default theme may come from Google.
        theme=gradio.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),
    )

    # Until it is launched, gradio accepts any file of this machine as a picture. A mounted
    # application is never launched.
    blocks.has_launched = True
    return Guard(app, folder, hosts)


def serve(app: Guard, listening: socket.socket):
    """Serve the page until a signal ends it."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None):
            app.app.routes[-1].app.stop_event.set()  # or open pages would keep their connections
            await super().shutdown(sockets)

    # Uvicorn raises the signal again when it has ended. SIGTERM would then leave the folder behind,
    # and programs that a shell starts in the background ignore SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup: the terminal closed
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    host, port = listening.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port} until Ctrl-C", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10)
    Server(config).run(sockets=[listening])
