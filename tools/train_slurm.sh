#!/bin/bash
# Train under Slurm, on one or several nodes, beyond the time limit of a job.
#
#     sbatch [--nodes=N] [options of sbatch] tools/train_slurm.sh --config-file FILE [key=value ...]
#
# Run it from the root of the repository, in the activated environment. The arguments are those of
# tools/train_net.py. Two minutes before the time limit, the run is saved and the job is put back
# into the queue; when it starts again, the run continues. For nodes without GPUs, set
# PROCESSES_PER_NODE. docs/several_machines.md has the details.

#SBATCH --job-name=stageinteractor
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

# torchrun passes SIGTERM on and then waits for this long instead of 30 seconds. SIGUSR1 would end
# it at once, so only this script receives SIGUSR1.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer takes it from sbatch

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# One torchrun per node; each finds the number of its node in its own environment.
# shellcheck disable=SC2016
srun --wait=120 bash -c 'exec python -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"' _ \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${PROCESSES_PER_NODE:-gpu}" \
    --master-addr "${nodes%%$'\n'*}" --master-port $((20000 + SLURM_JOB_ID % 10000)) \
    tools/train_net.py "$@" &
wait $!
code=$?
if [ "$stopped" ]; then # the signal has ended the wait, but not yet the run
    wait $!
    code=$?
    # torchrun does not pass on the exit code of a run that was saved; a complete run has 0.
    [ $code = 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
