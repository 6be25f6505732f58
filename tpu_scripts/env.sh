# shellcheck shell=bash
# The variables of every script here. Each can be set from outside: CONFIG=configs/t2i_scratch.py ./create.sh

# Your project: nothing here names a bucket, an image or an account that is not yours.
export PROJECT="${PROJECT:-my-project}"
export ZONE="${ZONE:-us-east5-a}"
export BUCKET="${BUCKET:-gs://my-bucket}" # same region as the zone
export WEIGHTS="${WEIGHTS:-$BUCKET/weights}" # config.paths.weights: what `metacanvas fetch` wrote
export DATA="${DATA:-$BUCKET/data}"          # config.paths.data
export RUNS="${RUNS:-$BUCKET/runs}"          # config.paths.runs: checkpoints, metrics, previews

# The run: a config, and values that replace its own.
export CONFIG="${CONFIG:-}" # such as configs/t2i_scratch.py:canvas
export OVERRIDES="${OVERRIDES:-}" # such as --config.train.steps=100; words as in a shell
run="${CONFIG##*/}"
run="${run/.py/}"
export RUN="${RUN:-${run/://}}"
export WORKDIR="${WORKDIR:-$RUNS/$RUN}"
export RESTARTS="${RESTARTS:-100}" # of a run that was preempted or lost a process (exit code 75 or 134)

# The machines. Empty: the slice that the config was planned for (the first of its `hardware`).
export NAME="${NAME:-metacanvas}"
export TPU="${TPU:-}"           # v4 v5e v5p v6e tpu7x
export TOPOLOGY="${TOPOLOGY:-}" # of one slice, such as 4x4
export SLICES="${SLICES:-}"     # 1
export SPOT="${SPOT:-1}"                      # 1: cheaper, may be taken back; the run goes on from its checkpoint
export VALID_UNTIL="${VALID_UNTIL:-24h}"      # how long the request may wait in the queue
export SERVICE_ACCOUNT="${SERVICE_ACCOUNT:-}" # of the TPU VMs, or the Kubernetes one on GKE; empty: the default one

# The code: this checkout on TPU VMs (setup.sh), a commit of a public repository on GKE (jobset.sh).
export REPOSITORY="${REPOSITORY:-}"
export REVISION="${REVISION:-}"        # a commit; empty: the one that is checked out here
export IMAGE="${IMAGE:-python:3.11}"   # any public image with Python 3.11 or later
export MOUNT="${MOUNT:-}"              # GKE: also mount the bucket there with Cloud Storage FUSE, such as /mnt/bucket
export CLUSTER="${CLUSTER:-}"          # GKE, with MOUNT: LOCATION/NAME of the cluster

# This machine: a Python in which this project is installed.
export PYTHON="${PYTHON:-}" # empty: .venv of this checkout, else python3
