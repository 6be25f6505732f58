"""Training on stored contexts: the same step, and what may not be stored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_metacanvas import LANGUAGE, data, fresh, make

from metacanvas_jax.data.batch import batch_of, mllm_inputs
from metacanvas_jax.diffusion.flow import TimeConfig
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.context_cache import ContextCache
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.parallel.rules import RULES
from metacanvas_jax.train.contexts import check_frozen, identity, stored_contexts
from metacanvas_jax.train.objectives import painting
from metacanvas_jax.vae.patch_pca.network import PatchPca, PatchPcaConfig


def test_qwen_step_on_stored_contexts_is_prepared_as_one_that_reads(tmp_path):
    model, vae = make(), PatchPca(PatchPcaConfig(patch=2, channels=4))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 6, 8, 3), np.uint8)
    frozen = {"mllm": fresh(model)["mllm"], "vae": jax.jit(vae.init)(jax.random.key(0), jnp.zeros((1, 1, 2, 2, 3)))}
    frozen["vae"] = frozen["vae"]["params"]
    batch = jax.device_get(batch_of(data()[0])) | {"pixels": pixels}
    prepare = jax.jit(painting(model, vae, TimeConfig())[0])

    def read(frozen, inputs):
        return model.apply({"params": {"mllm": frozen["mllm"]}}, inputs, method="read")

    enrich = stored_contexts(ContextCache(tmp_path, "weights"), mllm_inputs, read)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    stored = enrich(frozen, batch, mesh, RULES)
    assert "tokens" not in stored
    host = {type(leaf) for leaf in jax.tree.leaves((mllm_inputs(batch), stored))}
    assert host == {np.ndarray}, "what is on the host stays there: a read from a device waits for the steps in flight"
    expected = jax.device_get(prepare(frozen, batch, jax.random.key(1)))
    # With other weights at hand the stored prefix still is what it was.
    blank = frozen | {"mllm": jax.tree.map(jnp.zeros_like, frozen["mllm"])}
    got = jax.device_get(prepare(blank, enrich(blank, batch, mesh, RULES), jax.random.key(1)))
    real = np.asarray(expected.context.mask)
    np.testing.assert_array_equal(got.context.mask, real)
    np.testing.assert_array_equal(got.context.next_position, expected.context.next_position)
    np.testing.assert_allclose(got.context.hidden[real], expected.context.hidden[real], atol=1e-6)
    np.testing.assert_allclose(got.context.cache.keys[:, real], expected.context.cache.keys[:, real], atol=1e-6)
    np.testing.assert_array_equal(got.latents, expected.latents)


def init(key):
    del key
    names = ("mllm/language/q/kernel", "mllm/language/q_lora/a", "dit/out")
    tree = {}
    for name in names:
        *path, leaf = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = jnp.zeros(())
    return tree


def test_qwen_contexts_are_stored_of_frozen_named_weights_only():
    frozen = (("mllm/.*_lora/.*", "train"), ("mllm/.*", "freeze"), (".*", "train"))
    check_frozen(init, frozen, {"mllm": "hash"})
    with pytest.raises(UserError, match=r"needs mllm\.weights"):
        check_frozen(init, frozen, {})
    with pytest.raises(UserError, match="mllm/language/q/kernel trains"):
        check_frozen(init, ((".*", "train"),), {"mllm": "hash"})


def test_qwen_context_identity_is_that_of_the_weights_and_the_frozen_network():
    config = MllmConfig(LANGUAGE)
    one = identity({"mllm": config}, {"mllm": "a"}, "bfloat16")
    assert one == identity({"mllm": MllmConfig(dataclasses.replace(LANGUAGE, lora=None))}, {"mllm": "a"}, "bfloat16")
    assert one != identity({"mllm": config}, {"mllm": "b"}, "bfloat16")
    assert one != identity({"mllm": config}, {"mllm": "a"}, "float32")
    assert one != identity({"mllm": MllmConfig(dataclasses.replace(LANGUAGE, layers=3))}, {"mllm": "a"}, "bfloat16")
