#!/usr/bin/env bash
# Gives the slices back and deletes the request. Checkpoints and logs in the bucket stay.
#
#   ./teardown.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run "${QUEUE[@]}" delete "$NAME" "${PLACE[@]}" --force --quiet
