#!/usr/bin/env bash
# Ten minutes on one GPU: every stage of benchmarks/gpu_full.py, the most valuable first.
#
#     benchmarks/gpu_session.sh OUT PLACE [--tiny]
#
# OUT gets a JSON file for each stage, session.log and table.md. PLACE gets weights, runs and compiled programs (75 GB
# for all cases; with less, folders are written again when they are needed). Started again, the session goes on with
# the stages that have no result, and tries those again that failed. With --tiny it tries all of it on a CPU.
#
# SESSION_SECONDS  no stage begins later than this (600)
# STAGE_SECONDS    a stage is stopped after this (90)
# STAGES           the stages to run (all: gpu_full.py --list)
# WHEELS           a folder with the wheels of benchmarks/gpu_wheels.txt: they are installed into PLACE/venv, offline
# PYTHON           the interpreter (python3)
set -euo pipefail

[ $# -ge 2 ] || { sed -n '2,/^set /p' "$0" | grep '^#' | cut -c3- >&2; exit 2; }
out=$1 place=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
mkdir -p "$out" "$place"

if [ -n "${WHEELS:-}" ]; then
  if [ ! -f "$place/venv/ready" ]; then
    "$python" -m venv "$place/venv"
    "$place/venv/bin/pip" install --quiet --no-index --find-links "$WHEELS" -r "$here/gpu_wheels.txt"
    touch "$place/venv/ready"
  fi
  python=$place/venv/bin/python
fi
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"

begun=$SECONDS
stages=${STAGES:-$("$python" "$here/gpu_full.py" --list)}
for stage in $stages; do
  file=$out/$stage.json
  if [ -f "$file" ] && ! grep -q '"failed"' "$file"; then
    continue
  fi
  if [ $((SECONDS - begun)) -ge "${SESSION_SECONDS:-600}" ]; then
    echo "gpu_session: the time is over before $stage; start it again to go on" | tee -a "$out/session.log"
    break
  fi
  echo "gpu_session: $stage at $((SECONDS - begun)) s" | tee -a "$out/session.log"
  rm -f "$file"
  code=0
  timeout --kill-after=10 "${STAGE_SECONDS:-90}" \
    "$python" "$here/gpu_full.py" --run "$stage" --out "$out" --place "$place" "$@" >>"$out/session.log" 2>&1 || code=$?
  if [ ! -f "$file" ]; then # stopped by the clock, or killed, for example for memory
    printf '{"name": "%s", "failed": "stopped after %s s, exit code %s"}\n' \
      "$stage" "${STAGE_SECONDS:-90}" "$code" >"$file"
  fi
done
"$python" "$here/gpu_full.py" --table "$out" | tee "$out/table.md"
