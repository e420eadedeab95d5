#!/usr/bin/env python
"""Serve a web page to try a model: drop a picture, see its detections and what every stage did.

    pip install -e '.[web]'
    python tools/web_demo.py [--config-file FILE] --checkpoint FILE [--host 127.0.0.1] \\
        [--port 7860] [key=value ...]

Only this machine can reach the page unless --host says otherwise; there is no password. On this
machine, it answers only requests that name this machine, so that other web pages cannot use it
through somebody's browser. Neither the server nor the page contacts any other machine. Pictures may
be private: they stay in a temporary folder that only its user can read, for about ten minutes each.
The folder is removed when the server ends or, if the server was killed, at the next start.
"""

import argparse
import ipaddress

import _start

from projects.stageinteractor.analysis.web import web_server
from projects.stageinteractor.analysis.web.web_page import Page
from projects.stageinteractor.inference import load_detector


@_start.command
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="default: the checkpoint's own")
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="%(default)s; 0 takes a free one")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    with web_server.private_folder() as folder:
        gradio = web_server.import_gradio(folder)
        with web_server.listen(args.host, args.port) as listening:
            page = Page(load_detector(args.checkpoint, args.config_file, args.overrides))
            blocks = page.build(gradio, args.checkpoint)
            is_local = ipaddress.ip_address(listening.getsockname()[0]).is_loopback
            hosts = {*web_server.THIS_MACHINE, args.host.lower()} if is_local else None
            app = web_server.make_app(blocks, gradio, folder, hosts)
            web_server.serve(app, listening)


if __name__ == "__main__":
    main()
