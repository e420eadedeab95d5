"""Promises of tools/_start.py, which every tool imports first: how a tool prints and ends."""

import ast
import io
import logging
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import _start
import check
import convert
import pytest
from detectron2.utils import logger as detectron2_logger

from projects.stageinteractor.engine.setup import set_up_logging
from projects.stageinteractor.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if path != Path(_start.__file__))
BARE = [sys.executable, "-EsS"]  # without site-packages: no torch


def ending(raised):
    """The SystemExit of a tool whose main function raises that."""
    @_start.command
    def main(argv=None):
        raise raised

    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_every_tool_starts_with_it(tool):
    modules = []
    for node in ast.parse(tool.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module)
    foreign = [name for name in modules if name.split(".")[0] not in sys.stdlib_module_names]
    assert foreign[0] == "_start" and "tools" not in foreign


@pytest.mark.parametrize("old, new, command", [
    ("check_dataset", check, "data"), ("convert_dataset", convert, "dataset"),
])
def test_old_names_run_the_new_commands(old, new, command, monkeypatch):
    given = []
    monkeypatch.setattr(new, "main", lambda arguments: given.append(arguments) or 3)
    monkeypatch.setattr(sys, "argv", [f"{old}.py", "--val", "a.json"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / f"tools/{old}.py"), run_name="__main__")
    assert ended.value.code == 3 and given == [[command, "--val", "a.json"]]


def test_what_users_can_correct_is_one_line(monkeypatch):
    assert ending(UserError("no file x")).code == "error: no file x"
    assert "x.json" in ending(PermissionError(13, "Permission denied", "x.json")).code
    assert ending(BrokenPipeError(32, "Broken pipe")).code == "error: [Errno 32] Broken pipe"
    assert ending(KeyboardInterrupt()).code == 130
    with pytest.raises(ZeroDivisionError):
        ending(ZeroDivisionError())
    monkeypatch.setenv("STAGEINTERACTOR_TRACEBACK", "1")
    with pytest.raises(UserError):
        ending(UserError("no file x"))


def test_a_reader_may_leave():
    code = ("import sys; sys.path.insert(0, 'tools'); import _start\n"
            "_start.command(lambda argv: print(input()))()")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write(b"late\n")
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait() == 1
    process.stderr.close()


def test_any_name_can_be_printed_and_logged(monkeypatch, tmp_path):
    """On an ASCII console; log.txt is UTF-8 whatever the locale is."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    runpy.run_path(_start.__file__)
    monkeypatch.setattr(
        detectron2_logger.PathManager, "open",
        lambda name, mode, buffering: open(name, mode, buffering, encoding="ascii"),
    )
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore")]
    for logger in loggers:
        for name, value in (("handlers", []), ("level", logger.level), ("propagate", True)):
            monkeypatch.setattr(logger, name, value)
    try:
        set_up_logging(str(tmp_path))
        loggers[0].warning("кошка \udcff")
    finally:
        detectron2_logger.setup_logger.cache_clear()
    console.flush()
    assert rb"\u043a\u043e\u0448\u043a\u0430 \udcff" in console.buffer.getvalue()
    assert "кошка \\udcff" in (tmp_path / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("tool", [
    path for path in TOOLS if path.stem not in ("check", "install_detectron2")
], ids=lambda path: path.stem)
def test_a_python_without_the_packages_is_told_where_they_are(tool, tmp_path):
    for path in ("tools/_start.py", f"tools/{tool.name}", "projects/stageinteractor/errors.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for place, cure in ((None, "python ../tools/check.py env"),
                        (".venv/bin", f"run ../.venv/bin/python ../tools/{tool.name} 'a b'")):
        os.makedirs(tmp_path / (place or "elsewhere"))
        if place:
            (tmp_path / place / "python").touch()
        done = subprocess.run([*BARE, f"../tools/{tool.name}", "a b"], text=True,
                              cwd=tmp_path / "elsewhere", capture_output=True)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith(f"error: {sys.executable} has no torch: {cure}")
        assert done.stderr.count("\n") == 1
