#!/usr/bin/env bash
# Watches the request; when the slices are taken back, asks for new ones, sets them up and continues the run.
# Meant to be left running on a small machine that is not part of the slices.
#
#   ./resume.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while true; do
  now="$(state)"
  case "$now" in
    ACTIVE) if [ "$DRY_RUN" = 1 ]; then echo "# $NAME is ACTIVE: nothing to do"; fi ;;
    SUSPENDED | FAILED | ABSENT)
      echo "$(date +%FT%T) $NAME is $now: starting again" >&2
      if [ "$now" != ABSENT ]; then "$HERE/teardown.sh"; fi
      STATE=ACTIVE "$HERE/create.sh"
      "$HERE/setup.sh"
      "$HERE/launch.sh"
      ;;
    *) echo "$(date +%FT%T) $NAME is $now" >&2 ;;
  esac
  if [ "$DRY_RUN" = 1 ]; then break; fi
  sleep 120
done
