#!/usr/bin/env bash
# Runs a command until it ends with something that a restart does not mend. Exit code 75 means "preempted, or a process
# was lost; the checkpoint is written, start me again" (docs/operations.md); 134 is JAX's own end when process 0 is lost.
# Every other code is final. The last code is written to the file CODE, which ./status.sh and ./resume.sh read.
#
#   RESTARTS=100 CODE=run.code ./run_on_worker.sh COMMAND...
set -uo pipefail
for ((i = 0; i <= ${RESTARTS:-100}; i++)); do
  "$@"
  code=$?
  [ "$code" = 75 ] || [ "$code" = 134 ] || break
  echo "$(date -u +%FT%TZ) restart $((i + 1)) of ${RESTARTS:-100}" >&2
  sleep "${RESTART_WAIT:-10}"
done
if [ -n "${CODE:-}" ]; then echo "$code" >"$CODE"; fi
exit "$code"
