#!/usr/bin/env bash
# Copies this checkout (what git has committed) to every host and installs it there.
#
#   ./setup.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ -n "$(git -C "$ROOT" status --porcelain 2>/dev/null || true)" ]; then
  echo "note: changes that are not committed are not copied" >&2
fi
archive="${TMPDIR:-/tmp}/metacanvas_jax-$NAME.tar.gz" # of its own: slices are set up side by side
run git -C "$ROOT" archive --format=tar.gz --prefix=metacanvas_jax/ --output="$archive" HEAD
for node in "${NODES[@]}"; do
  run gcloud compute tpus tpu-vm scp "$archive" "$node:metacanvas_jax.tar.gz" "${PLACE[@]}" --worker=all
done
on_workers "set -e
tar xzf metacanvas_jax.tar.gz
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
export PATH=\$HOME/.local/bin:\$PATH
uv venv --quiet --allow-existing --python 3.11 venv
uv pip install --quiet --python venv/bin/python './metacanvas_jax[tpu,media]'
venv/bin/python -c 'import jax; print(jax.__version__)'"
