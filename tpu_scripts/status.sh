#!/usr/bin/env bash
# Prints the state of the request, then of the run on every host: running, ended with an exit code, lost, or none.
#
#   ./status.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [ "$DRY_RUN" = 1 ] && [ -z "${STATE:-}" ]; then # nothing is asked, and nothing is made up
  run "${QUEUE[@]}" describe "$NAME" "${PLACE[@]}" --format='value(state.state)'
  ask_hosts
  exit
fi
now="$(state)"
echo "$NAME $now"
if [ "$now" = ACTIVE ]; then hosts_say; fi
