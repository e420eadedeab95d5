"""What every tool does first: it imports this module before torch and Detectron2.

The import finds the project beside this folder, silences warnings that users cannot act on, and
makes printing safe. `@_start.command` decorates a tool's main function; `_start.run` calls another
program.
"""

import functools
import os
import re
import select
import shlex
import subprocess
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
    ("Glyph .* missing", UserWarning),  # matplotlib draws a box instead
    ("Image size", RuntimeWarning),  # Pillow refuses an image of twice the size
)

sys.path.insert(0, str(ROOT))
for message, category in WARNINGS:
    warnings.filterwarnings("ignore", message, category)
for stream in (sys.stdout, sys.stderr):  # classes and files have names in any alphabet
    if hasattr(stream, "reconfigure"):  # notebooks lack it
        stream.reconfigure(errors="backslashreplace")

from projects.stageinteractor.errors import UserError


def command(main):
    """Decorate a tool's main function, so that it ends the program as users expect.

    Errors that they can correct (UserError, OSError) become one line and exit code 1. The exit code
    is 130 after Ctrl-C, and 1 when the reader of a pipe has left, as `head` does. Any other error
    keeps its traceback; STAGEINTERACTOR_TRACEBACK=1 shows that of every error.
    """
    @functools.wraps(main)
    def guarded(argv=None):
        try:
            code = main(argv)
            sys.stdout.flush()  # so that its errors are handled below
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


def run(command, cure, timeout=None):
    """Run a command silently.

    Raises UserError, with the program's first error line and the cure, if the program is missing,
    fails or takes longer than timeout seconds.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{error}; {cure}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        errors = re.findall("(?mi)^ *(?:error|fatal): *(.+)", done.stderr)
        raise UserError(f"{(errors or lines[-1:])[0]}; {cure}")


def has_no_reader(descriptor):
    """Whether the other end of this pipe is closed; a BrokenPipeError may concern another one."""
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are always reported
    return bool(poll.poll(0))


def explain_missing(kind, error, trace):
    """An excepthook that says where the packages are, if this Python lacks them."""
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
