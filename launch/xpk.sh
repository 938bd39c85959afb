#!/usr/bin/env bash
# The same run through xpk, which writes the manifest itself: CLUSTER=... PROJECT=... ZONE=... IMAGE=... launch/xpk.sh
# --tpu-type counts cores for v5p (v5p-256 is 4x4x8, 128 chips) and chips for v5e (v5litepod-16) and v6e (v6e-256).
set -euo pipefail
: "${CLUSTER:?}" "${PROJECT:?}" "${ZONE:?}" "${IMAGE:?}"
WORKLOAD=${WORKLOAD:-nd-jax-teacher}
TPU_TYPE=${TPU_TYPE:-v5p-256}
TRAIN=${TRAIN:-"nd-jax train neodragon_320p teacher --out=/data/runs/teacher --latents=/data/latents --start=/data/systems/start --loop.mesh.fsdp=16 --loop.mesh.context=8"}

# DRY_RUN=1 writes the manifest and creates nothing.
xpk workload create \
  --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices=1 \
  --docker-image="$IMAGE" --max-restarts=20 \
  --command="$TRAIN" \
  ${DRY_RUN:+--dry-run --output-manifest-file="$WORKLOAD.yaml"}
