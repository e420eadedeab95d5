import shutil

import pytest

from support.detrex import FOLDER
from support.detrex_runs import ROOT
from support.shapes import make_shapes


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A detrex checkout with our folder in it, and drawn shapes beside it."""
    folder = tmp_path_factory.mktemp("detrex")
    for name in ("configs", "detrex", "tools"):
        shutil.copytree(FOLDER / name, folder / name, symlinks=True)
    shutil.copytree(ROOT / "projects/stageinteractor", folder / "projects/stageinteractor")
    make_shapes(folder / "shapes")
    return folder
