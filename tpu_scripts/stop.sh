#!/usr/bin/env bash
# Asks the run on all hosts to save a checkpoint and end. ./launch.sh goes on from there.
#
#   ./stop.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# First the loop that would start it again (it waits for its child), then the training itself.
on_workers "pid=\$(cat $LOG.pid) && child=\$(pgrep -P \$pid) && kill \$pid && kill -TERM \$child && echo stopped >$LOG.code"
