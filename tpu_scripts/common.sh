# shellcheck shell=bash
# What the scripts share: arguments, the slices of the run, and how commands are run or printed.
#
# A script sets TAKES to what may follow its options: "" (nothing), "worker" (a number), "train" (arguments of
# `metacanvas train`), and sources this file.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export HERE ROOT="$HERE/.."
# shellcheck source=env.sh
source "$HERE/env.sh"

fail() {
  echo "error: $*" >&2
  exit 2
}

DRY_RUN="${DRY_RUN:-0}" YES="${YES:-0}"
ARGUMENTS=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY_RUN=1 ;;
    --yes) YES=1 ;;
    -h | --help)
      sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
      exit 0
      ;;
    *)
      case "${TAKES:-}" in
        train) ;;
        worker) [[ "$argument" =~ ^[0-9]+$ && ${#ARGUMENTS[@]} = 0 ]] || fail "unknown argument '$argument'" ;;
        *) fail "unknown argument '$argument'; $(basename "$0") --help lists what there is" ;;
      esac
      ARGUMENTS+=("$argument")
      ;;
  esac
done
export DRY_RUN YES

# Runs a command, or prints it as it could be pasted into a shell.
run() {
  if [ "$DRY_RUN" = 1 ]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

# Says what is about to happen to machines, and goes on when the user agrees (or said --yes).
confirm() {
  echo "$1" >&2
  if [ "$DRY_RUN" = 1 ] || [ "$YES" = 1 ]; then return; fi
  [ -t 0 ] || fail "not done: nobody can be asked here; --yes agrees"
  local answer
  read -r -p "Go on? [y/N] " answer
  [[ "$answer" == [yY]* ]] || fail "not done"
}

# The slices (TPU TOPOLOGY SLICES HOSTS HOST_CHIPS HOST_MEMORY HOST_DISK MACHINE TYPE RUNTIME NODE ZONES MACHINES; GB of
# a host's memory and disk), and the command TRAIN.
if [ -z "$PYTHON" ]; then
  PYTHON=python3
  if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON="$ROOT/.venv/bin/python"; fi
fi
wanted=(machines)
if [ "${TAKES:-}" = train ]; then wanted=(train ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}); fi
found="$(PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" "$HERE/job.py" "${wanted[@]}")" ||
  fail "no machine was touched"
eval "$found"
export TPU TOPOLOGY SLICES HOSTS HOST_CHIPS HOST_MEMORY HOST_DISK MACHINE TYPE RUNTIME NODE ZONES MACHINES

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
# shellcheck disable=SC2153  # ZONES are those that offer the generation
PLACE=(--project="$PROJECT" --zone="$ZONE")

# on_workers COMMAND [WORKER]: a shell command on all hosts of all slices, or on one worker of the first.
on_workers() {
  local nodes=("${NODES[@]}")
  if [ "${2:-all}" != all ]; then nodes=("${NODES[0]}"); fi
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${PLACE[@]}" --worker="${2:-all}" --command="$1"
  done
}

# The state of the request; a dry run takes it from STATE.
state() {
  if [ "$DRY_RUN" = 1 ]; then
    echo "${STATE:-ACTIVE}"
    return
  fi
  "${QUEUE[@]}" describe "$NAME" "${PLACE[@]}" --format='value(state.state)' 2>/dev/null || echo ABSENT
}

# What every host says of the run: "HOST running", "HOST ended CODE", "HOST lost" (its machine was started again, or the
# process is gone) or "HOST no run". A dry run takes it from HOSTS_SAY.
hosts_say() {
  if [ "$DRY_RUN" = 1 ]; then
    echo "${HOSTS_SAY:-worker-0 running}"
    return
  fi
  ask_hosts
}

ask_hosts() {
  on_workers "h=\$(hostname)
if [ -f $LOG.code ]; then echo \"\$h ended \$(cat $LOG.code)\"
elif [ ! -f $LOG.pid ]; then echo \"\$h no run\"
elif grep -q run_on_worker /proc/\$(cat $LOG.pid)/cmdline 2>/dev/null; then echo \"\$h running\"
else echo \"\$h lost\"
fi"
}
