"""The batch script for Slurm, dry: stand-ins of Slurm's commands run everything on this machine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.runs import (
    CONFIG,
    ROOT,
    checkpoint_of,
    environment,
    last_checkpoint,
    metrics,
    overrides,
    wait_for,
)

SCRIPT = ROOT / "tools/train_slurm.sh"
STAND_INS = {
    # Starts the one task of each node, and notes what a signal to the job step has to reach.
    "srun": """[ "$1" = --wait=120 ] || exit 2
shift
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node "$@" &
    echo $! >> "$SLURM_NOTES/tasks"
done
for task in $(jobs -p); do wait "$task" || code=$?; done
exit "${code:-0}"
""",
    "scancel": """[ "$*" = "--signal=TERM $SLURM_JOB_ID" ] || exit 2
while read -r task; do kill -TERM "$task"; done < "$SLURM_NOTES/tasks"
""",
    "scontrol": """case "$*" in
    "show hostnames here,there") printf 'localhost\\nthere\\n' ;;
    "requeue $SLURM_JOB_ID") echo requeue >> "$SLURM_NOTES/requeued" ;;
    *) exit 2 ;;
esac
""",
}


@pytest.fixture
def sbatch(tmp_path):
    """Starts the batch script as Slurm does; whatever is left of it is killed afterwards."""
    commands, jobs = tmp_path / "bin", []
    commands.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}")
        (commands / name).chmod(0o755)
    path = [commands, Path(sys.executable).parent, os.environ["PATH"]]

    def sbatch(*arguments, nodes=1, restarts=0, per_node=2):
        (tmp_path / "tasks").unlink(missing_ok=True)
        variables = {
            "PATH": os.pathsep.join(map(str, path)),
            "PROCESSES_PER_NODE": per_node,
            "SLURM_JOB_ID": os.getpid(),  # of which the script makes a port
            "SLURM_JOB_NODELIST": "here,there",
            "SLURM_NNODES": nodes,
            "SLURM_NOTES": tmp_path,
            "SLURM_RESTART_COUNT": restarts,
        }
        job = subprocess.Popen(
            [SCRIPT, "--config-file", CONFIG, *arguments], cwd=ROOT,
            env={**environment(), **{name: str(value) for name, value in variables.items()}},
            stdout=open(tmp_path / "log", "ab"), stderr=subprocess.STDOUT, start_new_session=True,
        )
        jobs.append(job)
        return job

    yield sbatch
    for job in jobs:
        if job.poll() is None:  # torchrun ends its processes when it is asked to
            for task in (tmp_path / "tasks").read_text().split():
                os.kill(int(task), signal.SIGTERM)
            job.wait(60)


def test_a_job_saves_before_its_time_is_over_and_goes_on_when_requeued(
    sbatch, square_images, tmp_path
):
    folder = tmp_path / "run"
    long = {"train.max_iter": 1000, "train.eval_period": 0, "dataloader.train.num_workers": 1}
    options = overrides(square_images, folder, **long)
    job = sbatch(*options)
    wait_for(lambda: last_checkpoint(folder), job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) != 0
    said = (tmp_path / "log").read_text()
    assert "processes: 2" in said and "stopped and saved: --resume continues" in said
    assert (tmp_path / "requeued").read_text() == "requeue\n"
    done = checkpoint_of(folder, last_checkpoint(folder))["iteration"] + 1

    short = {"train.max_iter": done + 2, "train.eval_period": 0}
    options = overrides(square_images, folder, **short)
    assert sbatch(*options, restarts=1).wait(120) == 0
    assert f"Starting training from iteration {done}" in (tmp_path / "log").read_text()
    assert metrics(folder)[-1]["iteration"] == done + 2
    assert (tmp_path / "requeued").read_text() == "requeue\n"  # complete: not again


@pytest.mark.slow
def test_nodes_find_each_other_and_a_failed_job_is_not_requeued(sbatch, square_images, tmp_path):
    options = {"train.max_iter": 2, "train.eval_period": 0}
    folder = tmp_path / "run"
    assert sbatch(*overrides(square_images, folder, **options), nodes=2, per_node=1).wait(120) == 0
    assert (folder / "log.txt.rank1").exists() and (folder / "model_final.pth").exists()
    assert sbatch(*overrides(square_images, folder, **options)).wait(120) != 0
    assert "holds a run: continue it with --resume" in (tmp_path / "log").read_text()
    assert not (tmp_path / "requeued").exists()
