"""What every tool does first: `import _start` comes before torch and Detectron2 are imported.

It finds the project beside this folder, silences warnings that nobody here can act on, and makes
printing safe. `@_start.command` goes before a tool's main function.
"""

import functools
import os
import select
import shlex
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARNINGS = (
    ("`torch.jit.script` is deprecated", FutureWarning),  # Detectron2 scripts a function on import
    ("pkg_resources is deprecated", UserWarning),  # Detectron2's model zoo
    ("torch.meshgrid", UserWarning),  # Detectron2's Swin
    ("The given NumPy array is not writable", UserWarning),
    ("Glyph .* missing", UserWarning),  # matplotlib draws a box in its place
    ("Image size", RuntimeWarning),  # Pillow refuses an image of twice that size
)

sys.path.insert(0, str(ROOT))
for message, category in WARNINGS:
    warnings.filterwarnings("ignore", message, category)
for stream in (sys.stdout, sys.stderr):  # classes and files have names in any alphabet
    if hasattr(stream, "reconfigure"):  # a notebook's has not
        stream.reconfigure(errors="backslashreplace")

from projects.stageinteractor.errors import UserError


def command(main):
    """Decorate a tool's main function, so that it ends the program as users expect.

    What they can correct (UserError, OSError) becomes one line and exit code 1, Ctrl-C becomes
    exit code 130, and a reader that has left, as `head` does, exit code 1. Any other error keeps
    its traceback; STAGEINTERACTOR_TRACEBACK=1 shows that of every error.
    """
    @functools.wraps(main)
    def guarded(argv=None):
        try:
            code = main(argv)
            sys.stdout.flush()  # within reach of the handlers below
            return code
        except (UserError, OSError, KeyboardInterrupt) as error:
            if isinstance(error, BrokenPipeError) and has_no_reader(1):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is printed at exit
                sys.exit(1)
            if os.environ.get("STAGEINTERACTOR_TRACEBACK"):
                raise
            if isinstance(error, KeyboardInterrupt):
                print("interrupted", file=sys.stderr)
                sys.exit(130)
            sys.exit(f"error: {error}")

    return guarded


def has_no_reader(descriptor):
    """Whether the other end of a pipe was closed; another pipe than stdout may be the broken one.
    """
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are reported whatever is asked for
    return bool(poll.poll(0))


def explain_missing(kind, error, trace):
    """In place of the traceback of a Python that lacks the packages: which Python has them."""
    missing = [name for name in ("torch", "detectron2") if find_spec(name) is None]
    if not missing or not issubclass(kind, ModuleNotFoundError):
        return sys.__excepthook__(kind, error, trace)
    python = ROOT / ".venv/bin/python"
    if python.exists() and Path(sys.prefix) != ROOT / ".venv":
        cure = "run " + shlex.join([os.path.relpath(python), *sys.argv])
    else:
        cure = f"python {os.path.relpath(ROOT / 'tools/check.py')} env says how to install it"
    sys.stderr.write(f"error: {sys.executable} has no {missing[0]}: {cure}\n")


sys.excepthook = explain_missing
