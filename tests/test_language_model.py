"""The decoders that measured jobs are compared with: sizes, FLOPs of local windows and of split sequences, blocks."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.mesh import make_mesh, on_mesh, parse_mesh
from metacanvas_jax.train import flops

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def models():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("language_model")


@pytest.fixture(scope="module")
def blocks(models):
    return importlib.import_module("attention_blocks")


def mask(length, window=None):
    """The causal mask of a local window, as an array: the definition that counts are compared with."""
    query, key = np.indices((length, length))
    return (key <= query) & (key > query - (window or length))


# Of the model cards: Gemma 3 has 10,759 million parameters and a table of 1,012 million, Mistral 7.24 billion.
@pytest.mark.parametrize(
    ("name", "billions"), [("gemma3-12b", 11.77), ("mistral-7b", 7.24), ("llama2-7b", 6.74), ("llama3-8b", 8.03)]
)
def test_decoders_have_the_published_number_of_parameters(models, name, billions):
    assert models.DECODERS[name].parameters / 1e9 == pytest.approx(billions, rel=0.003)


def small(models, name, **changes):
    """A decoder of the same structure with few, narrow layers."""
    sizes = {"layers": 6, "width": 64, "heads": 8, "kv_heads": 4, "mlp": 128, "vocab": 256, "head_width": 32}
    return dataclasses.replace(models.DECODERS[name], **sizes | changes)


def shapes(model):
    params = {"layers": {}}
    for path, axes in model.shapes.items():
        group, _, name = path.rpartition("/")
        leaf = jax.ShapeDtypeStruct(tuple(size for _, size in axes), jnp.float32)
        (params[group] if group else params)[name] = leaf
    return params


def counted(models, model, length, **options):
    """FLOPs of all products and kernels of a gradient, recomputed ones left out."""
    loss = lambda params, tokens: models.next_token_loss(model, params, tokens, "full", **options)  # noqa: E731
    tokens = jax.ShapeDtypeStruct((4, length + 1), jnp.int32)
    return flops.model_flops(flops.count(jax.make_jaxpr(jax.grad(loss))(shapes(model), tokens)))


def test_a_local_window_counts_the_pairs_that_its_mask_shows(models):
    model = small(models, "gemma3-12b", window=24)
    seen = (mask(128).sum() + 5 * mask(128, 24).sum()) / 6
    assert model.pairs(128) == pytest.approx(seen, abs=1)
    scores = 4 * 12 * model.layers * model.heads * model.head_width * seen
    assert model.model_flops(4 * 128, 128) == pytest.approx(6 * model.multiplied * 4 * 128 + scores, rel=1e-3)
    assert counted(models, model, 128) == pytest.approx(model.model_flops(4 * 128, 128), rel=0.01)
    assert model.pairs(16) == mask(16).sum()  # a sequence shorter than the window


@pytest.mark.parametrize("exchange", ["gather", "ulysses"])
def test_devices_that_split_the_tokens_share_the_flops_of_the_whole(models, exchange):
    model = small(models, "llama3-8b")
    whole = counted(models, model, 4096)
    with on_mesh(make_mesh(parse_mesh("fsdp=2,context=4"), jax.devices())):
        assert counted(models, model, 4096, exchange=exchange) == pytest.approx(whole, rel=1e-3)


def test_jobs_that_a_context_axis_cannot_split_are_refused(models):
    mesh = make_mesh(parse_mesh("context=8"), jax.devices())
    for options, words in (
        ({"length": 4095}, "context 8 does not divide 4095 tokens"),
        ({"length": 4096, "exchange": "ulysses"}, "context 8 does not divide 4 key/value heads"),
        ({"length": 4096, "exchange": "ring"}, "exchange 'ring': expected one of gather, ulysses"),
    ):
        with pytest.raises(UserError, match=words):
            models.program(small(models, "llama3-8b"), mesh, batch=8, **options)


@pytest.mark.parametrize(("block", "window"), [((4, 4), None), ((2, 8), None), ((4, 4), 5), ((2, 8), 6), ((8, 2), 3)])
def test_blocks_are_computed_where_the_mask_shows_a_pair(blocks, block, window):
    tiles = mask(32, window).reshape(32 // block[0], block[0], 32 // block[1], block[1]).any(axis=(1, 3))
    assert blocks.computed_pairs(32, block, window) == tiles.sum() * block[0] * block[1]


def test_shares_of_the_measured_jobs_follow_from_their_blocks(models, blocks):
    jobs = json.loads((BENCHMARKS / "calibration" / "jobs.json").read_text())["jobs"]
    stated = {job["name"]: job for job in jobs if "blocks" in job["attention"]}
    assert any(models.DECODERS[job["model"]].window for job in stated.values())
    for name, job in stated.items():
        shares = blocks.computed_shares(models.DECODERS[job["model"]], job["length"], job["attention"]["blocks"])
        assert job["attention"]["computed"] == pytest.approx(shares, abs=1e-3), name


def test_kernels_of_a_backward_pass_count_by_their_products(models, blocks):
    model = models.DECODERS["llama3-8b"]
    apart = {"forward": (1024, 1024), "dkv": (1024, 2048), "dq": (1024, 1024)}
    forward, backward = blocks.computed_shares(model, 8192, apart)
    assert forward == pytest.approx(9 / 8, rel=1e-3)
    assert backward == pytest.approx((4 * 10 / 8 + 3 * 9 / 8) / 7, rel=1e-3)
