#!/bin/bash
# Train under Slurm, on one or several nodes, beyond the time limit of a job.
#
#     sbatch [--nodes=N] [options of sbatch] tools/train_slurm.sh --config-file FILE [key=value ...]
#
# from the root of the repository, in the activated environment. The arguments are those of
# tools/train_net.py. Two minutes before the time limit the run is saved and the job put back into
# the queue, and where it starts again it goes on. Nodes without GPUs: set PROCESSES_PER_NODE.
# docs/several_machines.md has the rest.

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

# torchrun answers SIGTERM by passing it on and waiting for this long, not for 30 seconds. SIGUSR1
# would end it at once, so that only this script gets that.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun takes it from sbatch no more

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# One torchrun a node, whose number each learns from its own environment.
# shellcheck disable=SC2016
srun --wait=120 bash -c 'exec python -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"' _ \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${PROCESSES_PER_NODE:-gpu}" \
    --master-addr "${nodes%%$'\n'*}" --master-port $((20000 + SLURM_JOB_ID % 10000)) \
    tools/train_net.py "$@" &
wait $!
code=$?
if [ "$stopped" ]; then # the signal has ended the waiting, and not yet the run
    wait $!
    code=$?
    # torchrun does not hand on the exit code of a run that was saved. One that is complete has 0.
    [ $code = 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
