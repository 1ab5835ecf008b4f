#!/bin/sh
# One run on all hosts of a TPU slice: docs/launch/tpu_pod.sh NAME ZONE. DATA and RUNS are folders that every host sees (Filestore, NFS).
set -eu
gcloud compute tpus tpu-vm ssh "$1" --zone="$2" --worker=all --command="
  cd avb_jax && . .venv/bin/activate && python -m experiments.celeba --distributed=auto \
    --config=experiments/configs/celeba.py --config.data.dir=$DATA --config.data.cache=/tmp/avb --workdir=$RUNS/celeba"
