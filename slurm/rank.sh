#!/usr/bin/env bash
# One rank: srun starts it once a task; it turns Slurm's variables into those of torchrun and becomes the command.
#   srun [options] slurm/rank.sh python -m solomonov.rank RUN_DIR
# MASTER_PORT, if it is set, is where the ranks meet; else it follows from the job.
set -euo pipefail

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
export LOCAL_RANK=$SLURM_LOCALID GROUP_RANK=$SLURM_NODEID

# Tasks on each node, as in 2(x3),1: nodes 0 to 2 have two, node 3 has one.
node=0
for part in ${SLURM_STEP_TASKS_PER_NODE//,/ }; do
  tasks=${part%%(*} nodes=1
  if [[ $part == *x* ]]; then nodes=${part##*x} nodes=${nodes%)}; fi
  if ((SLURM_NODEID >= node && SLURM_NODEID < node + nodes)); then export LOCAL_WORLD_SIZE=$tasks; fi
  node=$((node + nodes))
done

# shellcheck disable=SC2155 # set -e cannot see it, but an empty address is refused by the rank
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
exec "$@"
