#!/usr/bin/env bash
# Asks for the slices of the run (env.sh) as one queued resource and waits until they are there. It says first which
# machines these are, and asks; --yes agrees.
#
#   ./create.sh [--dry-run] [--yes]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ -n "$RUNTIME" ] || fail "$TPU is not offered as TPU VMs; use jobset.sh on GKE"
[[ " $ZONES " == *" $ZONE "* ]] || echo "note: zones that offered $TPU when this was written: $ZONES" >&2
echo "hosts of a slice: $HOSTS ($MACHINE), each with $HOST_MEMORY GB of memory and a boot disk of $HOST_DISK GB" >&2
confirm "create $NAME: $MACHINES in $ZONE ($PROJECT)$([ "$SPOT" = 1 ] && echo ', spot')"

request=("${QUEUE[@]}" create "$NAME" "${PLACE[@]}" --accelerator-type="$TYPE" --runtime-version="$RUNTIME"
  --valid-until-duration="$VALID_UNTIL")
if [ "$SLICES" -gt 1 ]; then
  request+=(--node-count="$SLICES" --node-prefix="$NAME")
else
  request+=(--node-id="$NAME")
fi
if [ "$SPOT" = 1 ]; then request+=(--spot); fi
if [ -n "$SERVICE_ACCOUNT" ]; then request+=(--service-account="$SERVICE_ACCOUNT"); fi
run "${request[@]}"

run "${QUEUE[@]}" describe "$NAME" "${PLACE[@]}" --format='value(state.state)'
while now="$(state)" && [ "$now" != ACTIVE ]; do
  case "$now" in
    FAILED | SUSPENDED | ABSENT) fail "the request $NAME is $now; ./teardown.sh, then try again" ;;
  esac
  echo "$(date +%H:%M:%S) $now" >&2
  sleep 60
done
