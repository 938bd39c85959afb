#!/usr/bin/env bash
# A slice of TPU VMs without Kubernetes: PROJECT=... ZONE=... BUCKET=... launch/tpu_vm.sh create|install|train|delete
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}"
NAME=${NAME:-nd-jax}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
TRAIN=${TRAIN:-"nd-jax train neodragon_320p teacher --out=/data/runs/teacher --latents=/data/latents --start=/data/systems/start"}

everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
  create)
    gcloud compute tpus tpu-vm create "$NAME" --project="$PROJECT" --zone="$ZONE" \
      --accelerator-type="$TYPE" --version="$RUNTIME" ${SPOT:+--spot}
    ;;
  install)
    : "${BUCKET:?}"
    gcloud compute tpus tpu-vm scp --recurse . "$NAME":nd-jax --project="$PROJECT" --zone="$ZONE" --worker=all
    everywhere "python3 -m pip install -c nd-jax/constraints.txt 'nd-jax/[tpu]' && sudo mkdir -p /data && sudo chown \$USER /data && gcsfuse --implicit-dirs $BUCKET /data"
    ;;
  train)
    # Every host starts the same command; each finds the others by itself. Run it again to resume.
    everywhere "JAX_COMPILATION_CACHE_DIR=/data/compiled PATH=\$HOME/.local/bin:\$PATH $TRAIN"
    ;;
  delete)
    gcloud compute tpus tpu-vm delete "$NAME" --project="$PROJECT" --zone="$ZONE"
    ;;
  *)
    echo "usage: $0 create|install|train|delete" >&2
    exit 2
    ;;
esac
