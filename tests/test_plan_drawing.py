"""Drawing on a TPU slice, planned: what one chip cannot hold is cut over all of them, what it can hold is copied."""

import jax
import pytest

pytest.importorskip("libtpu")

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.hardware import GIB
from metacanvas_jax.plan import programs
from metacanvas_jax.plan.study import study
from metacanvas_jax.plan.topology import find_slice


def drawing(config):
    setup, where = experiment(load_config(config, [])), find_slice("v5e:4x4")
    return programs.sample_program(setup, where.devices, setup.shapes[0]), where


def test_parameters_are_cut_or_copied_by_their_size():
    edit, _ = drawing("configs/image_editing.py")  # a DiT of 12 billion parameters, an MLLM of 7
    assert dict(edit.mesh.shape) == {"data": 1, "fsdp": 16, "context": 1, "tensor": 1}
    assert 2 < edit.held["parameters"] / GIB < 2.5, "bfloat16 over 16 chips"
    small, _ = drawing("configs/t2i_lora.py:miniature")
    assert dict(small.mesh.shape) == {"data": 16, "fsdp": 1, "context": 1, "tensor": 1}
    assert edit.samples == small.samples == 16


@pytest.mark.slow
def test_a_run_of_12_billion_parameters_is_drawn_on_sixteen_small_chips():
    program, where = drawing("configs/image_editing.py")
    with jax.default_matmul_precision(None), jax.numpy_dtype_promotion("standard"):
        report = study("image_editing", program, where, print)
    assert report.passed, report.verdict
