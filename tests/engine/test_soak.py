"""Thousands of iterations with evaluations and checkpoints: nothing grows but the logs."""

import os
import time
from pathlib import Path

import pytest
from scipy.stats import theilslopes

from support.runs import metrics, overrides, start
from support.shapes import make_shapes

STEPS, PERIOD = 4000, 250
RUN = {
    "train.max_iter": STEPS,
    "train.eval_period": PERIOD,
    "train.checkpointer.period": PERIOD,
    "train.log_period": 50,
    "train.model_ema.enabled": "true",
    "dataloader.train.num_workers": 1,
    "dataloader.test.num_workers": 1,
}
MiB = 2**20


def children_of(pid):
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                yield int(path.parent.name)
        except OSError:  # it has just ended
            pass


def used_by(pid, folder):
    """What a run holds now: memory in bytes, open files, processes, and bytes on the disk."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    memory = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {
        "memory": memory,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "processes": 1 + len(list(children_of(pid))),
        "checkpoints": sum(size for path, size in sizes.items() if "model_" in path.name),
        "logs": sum(size for path, size in sizes.items() if "model_" not in path.name),
    }


@pytest.mark.rare
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc, which Linux has")
def test_nothing_grows_in_thousands_of_iterations(tmp_path):
    """From one checkpoint to the next, the least that the run holds: it does not tend upwards."""
    shapes = make_shapes(tmp_path / "shapes", images=8, size=(64, 96))
    folder, least = tmp_path / "run", {}
    process = start(*overrides(shapes, folder, **RUN), log=tmp_path / "log")
    try:
        while process.poll() is None:
            time.sleep(1)
            saved = sorted(folder.glob("model_0*.pth"))
            if (folder / "model_final.pth").exists():
                process.wait(120)
            elif saved:
                try:
                    now = used_by(process.pid, folder)
                except OSError:  # it has just removed a file, or ended
                    continue
                before = least.setdefault(saved[-1].name, now)
                least[saved[-1].name] = {what: min(before[what], now[what]) for what in now}
    finally:
        process.kill()
    assert process.returncode == 0, (tmp_path / "log").read_text()[-2000:]
    assert metrics(folder)[-1]["iteration"] == STEPS
    for name, held in least.items():
        print(name, *(f"{what} {value / MiB if value > 9999 else value:.4g}"
                      for what, value in held.items()))
    assert len(least) > 0.8 * STEPS / PERIOD
    later = list(least.values())[len(least) // 4:]
    for what, allowed in (("memory", 0.01), ("files", 0), ("processes", 0), ("checkpoints", 0.01)):
        # Theil and Sen's slope, the median over all pairs: the last step up of an allocator does
        # not move it, what grows with the iterations does.
        growth = theilslopes([held[what] for held in later]).slope * len(later)
        assert growth <= allowed * later[0][what], (what, growth)
    assert later[-1]["logs"] < 10 * MiB
