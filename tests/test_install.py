"""What an installed wheel brings: the configs, the files beside the modules, and a command line that starts."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from metacanvas_jax import __version__
from metacanvas_jax.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
READ = """
import pathlib, sys
from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
for name in sys.argv[1:]:
    print(experiment(load_config(name, [])).name)
print(pathlib.Path(sys.modules["configs.base"].__file__).parent)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds what the wheel installs, made from a copy of the source tree."""
    pytest.importorskip("setuptools")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("metacanvas_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = subprocess.run([sys.executable, "-c", BUILD, folder], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *words: str) -> str:
    """The output of an interpreter that finds the wheel's package, and not the source tree's."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-P", *words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_wheel_reads_its_own_configs_anywhere(installed, tmp_path):
    *names, place = run(installed, tmp_path, "-c", READ, "configs/miniature.py", "configs/t2i_scratch.py").splitlines()
    assert names == ["miniature_canvas", "t2i_scratch_canvas"]
    assert Path(place) == installed / "metacanvas_jax" / "bundled" / "configs"


def test_a_wheel_installs_one_package(installed):
    """And no `configs` beside it, which is no name to take from others."""
    assert [path.name for path in installed.iterdir() if path.suffix != ".dist-info"] == ["metacanvas_jax"]


def test_a_wheel_has_the_files_beside_the_modules(installed):
    tracked = subprocess.run(["git", "ls-files", "metacanvas_jax"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout to compare with")
    names = [name for name in tracked.stdout.split() if (ROOT / name).exists()]
    assert names and [name for name in names if not (installed / name).exists()] == []


def test_the_module_is_the_command(installed, tmp_path):
    assert run(installed, tmp_path, "-m", "metacanvas_jax", "--version").strip() == f"metacanvas_jax {__version__}"


def test_the_version_is_that_of_the_wheel(installed):
    assert [path.name for path in installed.glob("*.dist-info")] == [f"metacanvas_jax-{__version__}.dist-info"]


def test_a_bare_command_shows_what_there_is(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n    {name} " not in shown] == []


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_every_command_and_its_arguments(shell, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert stopped.value.code == 0 and "--guidance" in script
    assert [name for name in COMMANDS if name not in script] == []
    if shell == "bash":
        checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_an_argument_without_a_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--steps=3"])
    assert stopped.value.code == 2
    assert "a command comes first" in capsys.readouterr().err
