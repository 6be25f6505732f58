"""A cloud on this machine: gcloud and kubectl write down what they are asked for, and hosts are folders.

Text for a host goes through ``bash -n``. A shell then runs it in the host's folder, where python, uv and metacanvas are
stubs. `metacanvas` writes down its arguments and ends with the next line of the file ``codes``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"

GCLOUD = r"""#!/usr/bin/env bash
printf '%s\0' "$(basename "$0")" "$@" call >>"$CALLS/$NAME"
[ "$NAME $4" != "${FAILS:-}" ] || exit 1
case "$1 $4" in
  "compute describe") cat "$CALLS/../state-$NAME" 2>/dev/null || echo ACTIVE ;;
  "compute scp") mkdir -p "$FLEET/${6%%:*}" && cp "$5" "$FLEET/${6%%:*}/${6#*:}" ;;
  "compute ssh")
    for word in "$@"; do
      if [[ "$word" == --command=* ]]; then text="${word#--command=}"; fi
    done
    bash -n <<<"$text" || exit 9
    mkdir -p "$FLEET/$5" && cd "$FLEET/$5" || exit 9
    env -i HOME="$FLEET/$5" FLEET="$FLEET" TESTS="$TESTS" PATH="$STUBS:/usr/bin:/bin" bash -c "$text"
    ;;
esac
"""
KUBECTL = r"""#!/usr/bin/env bash
cat >"$CALLS/jobset-$NAME.yaml"
printf '%s\0' kubectl "$@" call >>"$CALLS/$NAME"
"""
STUBS = {
    "uv": """#!/usr/bin/env bash
mkdir -p venv/bin && cp "$(dirname "$0")"/python "$(dirname "$0")"/metacanvas venv/bin/
""",
    "python": """#!/usr/bin/env bash
echo --xla_flag=true
""",
    "metacanvas": """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$HOME/arguments"
code="$(sed -n 1p "$FLEET/codes" 2>/dev/null)"
sed -i 1d "$FLEET/codes" 2>/dev/null
exit "${code:-0}"
""",
    "hostname": """#!/usr/bin/env bash
basename "$HOME"
""",
}


class Cloud:
    """The folders of a fake cloud and the environment in which scripts reach it."""

    def __init__(self, folder: Path):
        self.folder, self.calls, self.fleet = folder, folder / "calls", folder / "fleet"
        for name in ("bin", "stubs", "calls", "fleet"):
            (folder / name).mkdir()
        for name, text in {"bin/gcloud": GCLOUD, "bin/kubectl": KUBECTL}.items():
            self._script(folder / name, text)
        for name, text in STUBS.items():
            self._script(folder / "stubs" / name, text)
        self.environment = {
            "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "CALLS": str(self.calls),
            "FLEET": str(self.fleet),
            "STUBS": str(folder / "stubs"),
            "TESTS": str(folder),
            "PYTHON": sys.executable,
            "PROJECT": "mine",
            "ZONE": "us-east5-b",
            "BUCKET": "gs://mine",
            "REPOSITORY": "https://example.org/x.git",
        }

    @staticmethod
    def _script(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def asked(self, name: str = "metacanvas") -> list[list[str]]:
        """The arguments of every call for a request, in order."""
        path, lines = self.calls / name, [[]]
        for word in path.read_text().split("\0") if path.exists() else ():
            lines[-1].append(word)
            if word == "call":
                lines.append([])
        return [line[:-1] for line in lines[:-1]]

    def verbs(self, name: str = "metacanvas") -> list[str]:
        """The words of these calls that say what is asked, such as create or ssh."""
        return [line[4] if line[0] == "gcloud" else line[1] for line in self.asked(name)]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def script(name, *arguments, code=0, environment, stdin="", **variables):
    """Output of a script of tpu_scripts (stdout, or stderr where it fails)."""
    command = ["bash", str(SCRIPTS / f"{name}.sh"), *arguments]
    result = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, timeout=60, input=stdin
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout if code == 0 else result.stderr


GUARDED = f"{Path(__file__).parent / 'no_cloud'}:/usr/bin:/bin"
"""A PATH on which gcloud and kubectl fail, whatever a developer has installed."""
BARE = {
    "PATH": GUARDED,
    "HOME": os.environ.get("HOME", "/"),
    "PYTHON": sys.executable,
    "PROJECT": "mine",
    "ZONE": "us-east5-b",
    "BUCKET": "gs://mine",
    "REPOSITORY": "https://example.org/x.git",
    "CONFIG": "configs/video_stage3.py",
    "RUN": "stage3",
    "TPU": "v5p",
    "TOPOLOGY": "4x4x8",
    "CHECKED": "1",
}
"""A run whose config was read before: scripts start at once."""
