"""Programs that run in a checkout of detrex with our folder in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from support.runs import environment, metrics, overrides

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = "projects/stageinteractor/configs"
SITE = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]

# Overrides of a tiny run that its config does without.
FILES = {f"dataloader.{split}.dataset.{key}": None
         for split in ("train", "test") for key in ("json_file", "image_root")}

# At the end of every run there: of this repository, nothing is loaded or can be imported.
ALONE = f"""
import sys
from pathlib import Path
import projects
folders = {{Path(folder).resolve() for folder in projects.__path__}}
files = [m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
places = map(Path.resolve, map(Path, [*files, *sys.path]))
ours = [p for p in places if Path({str(ROOT)!r}) in (p, *p.parents)
        and not {{"site-packages", "dist-packages"}} & {{*p.parts}}]
if ours or folders != {{Path("projects").resolve()}}:  # no assertion, which -O would remove
    raise AssertionError((ours, folders))
"""

# As `python tools/train_net.py ARGUMENTS`, several times in one process.
TRAIN_NET = """
import json, runpy, sys
sys.path[0] = "tools"
for arguments in map(json.loads, sys.argv[1:]):
    sys.argv = ["tools/train_net.py", *arguments]
    runpy.run_path("tools/train_net.py", run_name="__main__")
""" + ALONE


def python(checkout, script, *arguments, expect=0):
    """What a script prints that Python runs in the checkout, which is installed editably.

    Without `site`, which would make this repository importable where it is installed so, and for
    training without assertions, since detrex asserts that there is CUDA in each step.
    """
    flags = ["-S", "-O"] if TRAIN_NET in script else ["-S"]
    done = subprocess.run(
        [sys.executable, *flags, "-c", script, *arguments], cwd=checkout, text=True, timeout=3000,
        env={**environment(), "PYTHONPATH": os.pathsep.join([*SITE, str(checkout)])},
        capture_output=True,
    )
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def arguments(checkout, name, output, *flags, **options):
    """Of detrex's train_net.py, for a tiny variant of a config."""
    keys = overrides(checkout / "shapes/annotations.json", output, **options)
    return json.dumps([*flags, "--config-file", f"{CONFIGS}/{name}.py", *keys])


def check_steps(checkout, runs):
    """Every run has logged its steps, all with finite losses."""
    for output, steps in runs.items():
        rows = [row for row in metrics(checkout / output) if "lr" in row]
        assert [row["iteration"] for row in rows] == [*range(steps)]
        assert np.isfinite([row["total_loss"] for row in rows]).all()


def load(file):
    return torch.load(file, map_location="cpu", weights_only=True)
