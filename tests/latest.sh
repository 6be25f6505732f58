#!/usr/bin/env bash
# The torch-free tests on the newest Python found, with the newest JAX that Python can have.
# PYTHON_LATEST names the interpreter; otherwise the newest of 3.14, 3.13, 3.12 that starts, on PATH or under pyenv.
set -euo pipefail
cd "$(dirname "$0")/.."

candidates=()
if [ -n "${PYTHON_LATEST:-}" ]; then
  candidates=("$PYTHON_LATEST")
else
  for minor in 14 13 12; do
    candidates+=("python3.$minor")
    for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python; do candidates+=("$path"); done
  done
fi

python=""
for candidate in "${candidates[@]}"; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "test-latest: no Python 3.12 or newer starts here (tried: ${candidates[*]}); name one with PYTHON_LATEST=" >&2
  exit 1
fi

venv=.venv-latest
if [ ! -x "$venv/bin/python" ]; then "$python" -m venv "$venv"; fi
"$venv/bin/pip" install --quiet --upgrade --upgrade-strategy eager --editable '.[miniature,media,dev]'
"$venv/bin/python" -c 'import platform, flax, jax; print(f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}")'
exec "$venv/bin/python" -m pytest -m 'not slow and not torch' -n 2 --dist worksteal -q
