"""Frozen parameters that no program of a training reads are not held."""

import jax
import pytest

from metacanvas_jax.config import read
from metacanvas_jax.config.load import load_config
from metacanvas_jax.paint.needs import needed
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.plan import programs
from metacanvas_jax.trees import flat

HEAD, TOWER = "mllm/language/head/kernel", "mllm/vision/merger/up/kernel"


def frozen_of(name):
    setup = programs.with_latents(read.experiment(load_config(name, [])))
    return flat(programs.abstract_params(setup, make_mesh(MeshConfig()))[1])


@pytest.mark.parametrize(
    ("name", "sees"),
    [("t2i_lora.py", False), ("image_editing.py", True), ("video_stage1.py", True)],
)
def test_heads_are_never_held_and_towers_where_a_task_shows_a_picture(name, sees):
    held = frozen_of(f"configs/{name}")
    assert HEAD not in held
    assert (TOWER in held) == sees
    assert "mllm/language/embedding/table" in held


@pytest.mark.parametrize("name", ["t2i_lora.py:miniature", "image_editing.py:miniature"])
def test_what_is_held_of_the_mllm_is_what_a_step_reads(name):
    """A step is traced without the rest, so that it reads none of it."""
    setup = read.experiment(load_config(f"configs/{name}", []))
    read_paths = set()
    for bucket in setup.shapes:
        program = programs.train_program(setup, make_mesh(MeshConfig(), jax.devices()[:1]), bucket)
        state, frozen, *_ = program.arguments
        names = [("state", leaf) for leaf in jax.tree.leaves(state)] + list(flat(frozen).items())
        read_paths |= needed(program.traced.jaxpr, names).keys()
    held = {path for path in flat(frozen) if path.startswith("mllm/")}
    assert held
    assert not held - read_paths
