#!/bin/bash
# One job of ./lab submit: an experiment, or one shard of it when SLURM runs this as an array.
# Compute nodes have no internet: everything was fetched on the login node.
set -euo pipefail
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    set -- "$@" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
fi
exec ./lab run "$@"
