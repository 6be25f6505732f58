#!/usr/bin/env bash
# Gives the slices back and deletes the request. Checkpoints and logs in the bucket stay. It says first which machines
# these are, and asks; --yes agrees.
#
#   ./teardown.sh [--dry-run] [--yes]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
confirm "delete $NAME: $MACHINES in $ZONE ($PROJECT)"
run "${QUEUE[@]}" delete "$NAME" "${PLACE[@]}" --force --quiet
