# shellcheck shell=bash
# The variables of every script here. Each can be set from outside: TPU=v6e TOPOLOGY=16x16 ./create.sh

# Your project: nothing here names a bucket, an image or an account that is not yours.
export PROJECT="${PROJECT:-my-project}"
export ZONE="${ZONE:-us-east5-a}"
export BUCKET="${BUCKET:-gs://my-bucket}" # same region as the zone; checkpoints, data and logs lie in it

# The machines: generation (v4 v5e v5p v6e tpu7x), topology of one slice, number of slices.
export NAME="${NAME:-metacanvas}"
export TPU="${TPU:-v5p}"
export TOPOLOGY="${TOPOLOGY:-4x4x8}"
export SLICES="${SLICES:-1}"
export SPOT="${SPOT:-1}"                   # 1: cheaper, may be taken back; the run goes on from its checkpoint
export VALID_UNTIL="${VALID_UNTIL:-24h}"   # how long the request may wait in the queue
export SERVICE_ACCOUNT="${SERVICE_ACCOUNT:-}" # empty: the default one of the project

# The run. `metacanvas train` gets everything after the config unchanged.
export RUN="${RUN:-stage3}"
export CONFIG="${CONFIG:-configs/video_stage3.py}"
export OVERRIDES="${OVERRIDES:-}"
export WORKDIR="${WORKDIR:-$BUCKET/runs/$RUN}"
export RESTARTS="${RESTARTS:-100}" # of a run that was preempted or lost a process (exit code 75 or 134)

# The code: this checkout on TPU VMs (setup.sh), a public repository for GKE (jobset.sh).
export REPOSITORY="${REPOSITORY:-}"
export REVISION="${REVISION:-main}"
export IMAGE="${IMAGE:-python:3.11}" # any public image with Python 3.11 or later
