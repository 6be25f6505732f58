#!/usr/bin/env bash
# Starts the run of env.sh on all hosts, in the background; its output goes to RUN.log (/ as -) in each host's home folder.
# Starting a run whose WORKDIR holds checkpoints continues it. A host on which it runs already is left alone.
#
#   ./launch.sh [--dry-run] [EXTRA ARGUMENTS OF metacanvas train]
# shellcheck disable=SC2034
TAKES=train
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

on_workers "set -e
if grep -q run_on_worker /proc/\$(cat $LOG.pid 2>/dev/null || echo none)/cmdline 2>/dev/null; then echo running already; exit; fi
cd metacanvas_jax
rm -f \$HOME/$LOG.code
export PATH=\$HOME/venv/bin:\$PATH RESTARTS=$RESTARTS CODE=\$HOME/$LOG.code
LIBTPU_INIT_ARGS=\"\$(python tpu_scripts/flags.py $TPU)\"
export LIBTPU_INIT_ARGS
setsid nohup tpu_scripts/run_on_worker.sh $TRAIN >>\$HOME/$LOG.log 2>&1 </dev/null &
echo \$! >\$HOME/$LOG.pid"
