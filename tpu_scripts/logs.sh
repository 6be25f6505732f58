#!/usr/bin/env bash
# Follows the output of the run on one worker (0, where progress is printed, unless given).
#
#   ./logs.sh [--dry-run] [WORKER]
# shellcheck disable=SC2034
TAKES=worker
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
on_workers "tail -n 100 -F $LOG.log" "${ARGUMENTS[0]:-0}"
