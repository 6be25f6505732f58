#!/usr/bin/env bash
# Watches the request and the run. When the slices are taken back, it asks for new ones and sets them up. When a host has
# lost the run (its machine was started again, or a restart has mended nothing), it starts the run there. It ends with the
# run: with code 0 when it is done, and with the run's code when that is an error that a restart does not mend.
# Meant to be left running on a small machine that is not part of the slices. It asks once; --yes agrees.
#
#   ./resume.sh [--dry-run] [--yes]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
confirm "keep $NAME: $MACHINES in $ZONE ($PROJECT), created anew whenever they are taken back"
export YES=1

# Exit codes that a restart mends: preempted, no answer of process 0, killed (docs/operations.md).
again() { [[ " 75 134 137 143 " == *" $1 "* ]]; }

while true; do
  now="$(state)"
  case "$now" in
    ACTIVE)
      said="$(hosts_say)" || said="" # hosts that do not answer now are asked again
      codes="$(awk '$2 == "ended" {print $3}' <<<"$said" | sort -u)"
      lost="$(awk '$2 == "lost" || $2 == "no"' <<<"$said")"
      for code in $codes; do
        if again "$code"; then
          lost="$lost code $code"
        elif [ "$code" = stopped ]; then
          echo "$RUN was stopped; ./launch.sh goes on with it" >&2
          exit 0
        elif [ "$code" != 0 ]; then
          printf '%s\n' "$said" "error: $RUN ended with code $code; see ./logs.sh" >&2
          exit "$code"
        fi
      done
      if [ -n "$lost" ]; then
        echo "$(date +%FT%T) started where it is not running: $(tr '\n' ' ' <<<"$lost")" >&2
        "$HERE/launch.sh"
      elif [ "$codes" = 0 ] && ! grep -q running <<<"$said"; then
        echo "$RUN is done; ./teardown.sh gives the machines back" >&2
        exit 0
      elif [ "$DRY_RUN" = 1 ]; then
        echo "# $NAME is ACTIVE: nothing to do"
      fi
      ;;
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
  sleep "${RESUME_WAIT:-120}"
done
