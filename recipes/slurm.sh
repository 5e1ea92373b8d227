#!/bin/bash
# sbatch recipes/slurm.sh configs/gpt2_124m.yaml [--options of the run]
#
# Submit from the repository, on a file system that all nodes share. One task per GPU, without torchrun: srun forwards
# signals to the ranks directly, while torchrun would kill them after 30 seconds.
#SBATCH --job-name=training
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

srun bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec .venv/bin/python -m training.train --config "$@"
' rank "$@" &
ranks=$!

# SIGTERM comes 120 seconds before the time limit, or from `scancel --batch --signal=TERM`: the ranks save and exit
# with status 143.
trap 'kill -TERM "$ranks"' TERM
wait "$ranks"; status=$?
while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; status=$?; done

# 143: stopped and saved. 1, 137, ...: a rank was lost. Do not requeue after 2 (wrong input) or 0 (the run is complete).
if ((status != 0 && status != 2)) && ((${SLURM_RESTART_COUNT:-0} < 50)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
