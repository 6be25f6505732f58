"""The scripts of benchmarks/ start as the documentation calls them: by path, with nothing but the package installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if "argparse" in path.read_text())
OWN = {"configs", "benchmarks", "tests", "examples"}


def imported(path: Path) -> set[str]:
    """Modules that a script imports at its beginning, and those that its neighbours import."""
    found = set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
    beside = [path.parent / f"{name}.py" for name in found]
    return found.union(*(imported(one) for one in beside if one.exists()))


@pytest.mark.parametrize("script", [path for path in SCRIPTS if imported(path) & OWN], ids=lambda path: path.stem)
def test_a_script_that_reads_this_checkout_finds_it(script, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr[-500:]
