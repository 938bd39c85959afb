#!/usr/bin/env bash
#SBATCH --job-name=nd-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@300
#SBATCH --requeue
# One process per node; the first node coordinates. sbatch launch/slurm.sh
set -euo pipefail
TRAIN=${TRAIN:-"nd-jax train neodragon_320p teacher --out=/data/runs/teacher --latents=/data/latents --start=/data/systems/start"}
srun --kill-on-bad-exit=1 bash -c "$TRAIN"
