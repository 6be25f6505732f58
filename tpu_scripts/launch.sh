#!/usr/bin/env bash
# Starts the run of env.sh on all hosts, in the background; its output goes to RUN.log (/ as -) in each host's home folder.
# Starting a run whose WORKDIR holds checkpoints continues it.
#
#   ./launch.sh [--dry-run] [EXTRA ARGUMENTS OF metacanvas train]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

command="$TRAIN --processes $((HOSTS * SLICES))${ARGUMENTS[*]:+ ${ARGUMENTS[*]}}"
on_workers "set -e
cd metacanvas_jax
export PATH=\$HOME/venv/bin:\$PATH RESTARTS=$RESTARTS
LIBTPU_INIT_ARGS=\"\$($FLAGS)\"
export LIBTPU_INIT_ARGS
setsid nohup tpu_scripts/run_on_worker.sh $command >>\$HOME/$LOG.log 2>&1 </dev/null &
echo \$! >\$HOME/$LOG.pid"
