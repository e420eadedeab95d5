"""Pages of ``docs/`` as tests read them: tables, code, links, and what their names stand for."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "projects.stageinteractor"
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def tables(page):
    """Rows of every table: a list of tables, each a list of dictionaries by column."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", FENCE.sub("", read(page)), re.M):
        head, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                          for line in block.splitlines())
        assert all(len(row) == len(head) for row in rows), (page, head)
        found.append([dict(zip(head, row)) for row in rows])
    return found


def table(page, column):
    """The rows of all tables that have a column of this name."""
    return [row for rows in tables(page) for row in rows if column in row]


def code_spans(text):
    """What stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def links(page):
    """Files of this repository that a page links to."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", read(page))
    return [(ROOT / page).parent / target for target in targets if "://" not in target]


def module_of(path):
    """The module in a file that a page names as the project's README does."""
    assert path.endswith(".py"), path
    name = path.removesuffix(".py").replace("/", ".")
    if name.startswith("tools."):  # a name that detrex owns where it is installed
        name = name.removeprefix("tools.")
    elif not name.startswith(("detectron2.", "projects.")):
        name = f"{PACKAGE}.{name}"
    return importlib.import_module(name)


def resolve(path, symbol):
    """The object that a file has under a dotted name.

    Raises:
        AttributeError: there is none.
    """
    found = module_of(path)
    for name in symbol.split("."):
        found = getattr(found, name)
    return found
