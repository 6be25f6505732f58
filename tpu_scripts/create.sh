#!/usr/bin/env bash
# Asks for the slices of env.sh as one queued resource and waits until they are there.
#
#   ./create.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ -n "$RUNTIME" ] || fail "$TPU is not offered as TPU VMs; use jobset.sh on GKE"

request=("${QUEUE[@]}" create "$NAME" "${PLACE[@]}" --accelerator-type="$TYPE" --runtime-version="$RUNTIME"
  --valid-until-duration="$VALID_UNTIL")
if [ "$SLICES" -gt 1 ]; then
  request+=(--node-count="$SLICES" --node-prefix="$NAME")
else
  request+=(--node-id="$NAME")
fi
[ "$SPOT" = 1 ] && request+=(--spot)
[ -n "$SERVICE_ACCOUNT" ] && request+=(--service-account="$SERVICE_ACCOUNT")
run "${request[@]}"

run "${QUEUE[@]}" describe "$NAME" "${PLACE[@]}" --format='value(state.state)'
while now="$(state)" && [ "$now" != ACTIVE ]; do
  case "$now" in
    FAILED | SUSPENDED | ABSENT) fail "the request $NAME is $now; ./teardown.sh, then try again" ;;
  esac
  echo "$(date +%H:%M:%S) $now" >&2
  sleep 60
done
