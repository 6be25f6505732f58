"""The kernels under the TPU interpreter with race detection, on one core and on two."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from kernel_support import draw, errors, exact_and_gradients, inputs

from metacanvas_jax.kernels.attention import MaskSpec
from metacanvas_jax.kernels.flash_fixed_max import flash_attention
from metacanvas_jax.kernels.linear_attention_tpu import linear_attention
from metacanvas_jax.kernels.tiles import Tiles

TILES = Tiles(block_q=128, block_k=128, tile_q=128, tile_k=128, depth=0)


def interpreter(cores):
    return pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)


def races_found():
    """Of the kernel that ran last. JAX keeps it in a private module only."""
    module = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    return module.races.races_found


@pytest.fixture(autouse=True)
def fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("cores", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_flash_attention_has_no_races(cores):
    q, k, v, dout = inputs(1, 140, 130, 1, 1, 128)

    def flash(*x):
        return flash_attention(*x, forward=TILES, backward=TILES, interpret=interpreter(cores))

    out, pull = jax.vjp(flash, q, k, v)
    assert not races_found()
    grads = pull(dout)
    assert not races_found()
    assert max(errors((out, *grads), exact_and_gradients(q, k, v, dout, MaskSpec()))) <= 1e-5


@pytest.mark.parametrize("cores", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_linear_attention_has_no_races(cores):
    q, k, v, dout = (draw(2, 30, 4, 32, seed=i) for i in range(4))
    out, pull = jax.vjp(lambda *x: linear_attention(*x, 16, interpreter(cores)), q, k, v)
    assert not races_found()
    grads = pull(dout)
    assert not races_found()
    plain, pull = jax.vjp(lambda *x: linear_attention(*x, None, True), q, k, v)
    assert max(errors((out, *grads), [np.asarray(x, np.float64) for x in (plain, *pull(dout))])) <= 1e-5


@pytest.mark.filterwarnings("ignore")
def test_a_planted_race_is_found(capfd):
    """Steps said to be independent that write one block: what a wrong ``dimension_semantics`` would do."""

    def kernel(x, out):
        out[...] = x[...] + pl.program_id(0).astype(jnp.float32)

    def run(semantics):
        call = pl.pallas_call(
            kernel,
            grid=(2,),
            in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics,)),
            interpret=interpreter(2),
        )
        raced = False
        try:
            jax.block_until_ready(call(jnp.ones((16, 128))))
        except jax.errors.JaxRuntimeError as error:  # jax 0.12 stops where jax 0.10 only prints
            raced = "RACE DETECTED" in str(error)
        return raced or (races_found() and "RACE DETECTED" in "".join(capfd.readouterr()))

    assert run("parallel")
    pltpu.reset_tpu_interpret_mode_state()
    assert not run("arbitrary")
