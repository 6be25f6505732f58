# shellcheck shell=bash
# What the scripts share: arguments, the sizes that follow from the topology, and how commands are run or printed.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export HERE ROOT="$HERE/.."
# shellcheck source=env.sh
source "$HERE/env.sh"

DRY_RUN="${DRY_RUN:-0}"
ARGUMENTS=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY_RUN=1 ;;
    -h | --help)
      sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
      exit 0
      ;;
    *) ARGUMENTS+=("$argument") ;;
  esac
done
export DRY_RUN

fail() {
  echo "error: $*" >&2
  exit 2
}

# Runs a command, or prints it as it could be pasted into a shell.
run() {
  if [ "$DRY_RUN" = 1 ]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

# Chips of a slice, and the names under which the generation is sold and selected.
CHIPS=$((${TOPOLOGY//x/ * }))
case "$TPU" in
  v4) TYPE="v4-$((2 * CHIPS))" RUNTIME="tpu-ubuntu2204-base" NODE="tpu-v4-podslice" ;;
  v5e) TYPE="v5litepod-$CHIPS" RUNTIME="v2-alpha-tpuv5-lite" NODE="tpu-v5-lite-podslice" ;;
  v5p) TYPE="v5p-$((2 * CHIPS))" RUNTIME="v2-alpha-tpuv5" NODE="tpu-v5p-slice" ;;
  v6e) TYPE="v6e-$CHIPS" RUNTIME="v2-alpha-tpuv6e" NODE="tpu-v6e-slice" ;;
  tpu7x) TYPE="tpu7x-$((2 * CHIPS))" RUNTIME="" NODE="tpu7x" ;; # offered through GKE: use jobset.sh
  *) fail "TPU is '$TPU', expected v4, v5e, v5p, v6e or tpu7x" ;;
esac
HOSTS=$(((CHIPS + 3) / 4)) # of one slice; a host has four chips (on v5e and v6e: machine types that end in -4t)
export CHIPS TYPE RUNTIME NODE HOSTS

# The TPU VMs of the request: one per slice.
NODES=("$NAME")
if [ "$SLICES" -gt 1 ]; then
  NODES=()
  for ((i = 0; i < SLICES; i++)); do NODES+=("$NAME-$i"); done
fi

# The run in the names of files and of Kubernetes objects; a sweep's run is SWEEP/POINT.
LOG="${RUN//\//-}"
OBJECT="$(tr '[:upper:]_./=+' '[:lower:]-----' <<<"$NAME-$LOG")"
if [ "$OBJECT" = "$NAME-$NAME" ]; then OBJECT="$NAME"; fi
export LOG OBJECT

QUEUE=(gcloud compute tpus queued-resources)
PLACE=(--project="$PROJECT" --zone="$ZONE")

# on_workers COMMAND [WORKER]: a shell command on all hosts of all slices, or on one worker of the first.
on_workers() {
  local nodes=("${NODES[@]}")
  if [ "${2:-all}" != all ]; then nodes=("${NODES[0]}"); fi
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${PLACE[@]}" --worker="${2:-all}" --command="$1"
  done
}

state() {
  if [ "$DRY_RUN" = 1 ]; then
    echo "${STATE:-ACTIVE}"
    return
  fi
  "${QUEUE[@]}" describe "$NAME" "${PLACE[@]}" --format='value(state.state)' 2>/dev/null || echo ABSENT
}

# What a worker runs, and what prints the compiler flags of the generation.
TRAIN="metacanvas train --config $CONFIG --workdir $WORKDIR${OVERRIDES:+ $OVERRIDES}"
FLAGS="python tpu_scripts/flags.py $TPU"
export TRAIN FLAGS
