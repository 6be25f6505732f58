"""Low-rank adapters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.nn.layers import Dense
from metacanvas_jax.nn.lora import Lora, LoraConfig, adapter, plus


def make(config, features=6, width=200):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, width)), jnp.float32)
    module = Lora(config, features, ("embed", "heads"), "float32")
    return module, nn.unbox(module.init(jax.random.key(1), x))["params"], x


def test_lora_delta_is_the_scaled_product_of_its_factors():
    module, params, x = make(LoraConfig(rank=4, alpha=10.0))
    b = jnp.asarray(np.random.default_rng(2).standard_normal((4, 6)), jnp.float32)
    got = module.apply({"params": params | {"b": b}}, x)
    np.testing.assert_allclose(
        got, 2.5 * np.asarray(x) @ (np.asarray(params["a"]) @ np.asarray(b)), rtol=1e-4, atol=1e-5
    )


def test_lora_starts_at_zero_with_the_bounds_of_peft():
    module, params, x = make(LoraConfig(rank=4, alpha=4.0))
    assert not module.apply({"params": params}, x).any()
    a = np.abs(params["a"])
    assert params["a"].shape == (200, 4) and 0.95 * 200**-0.5 < a.max() <= 200**-0.5


def test_lora_drops_inputs_in_training_only():
    module, params, x = make(LoraConfig(rank=4, alpha=4.0, dropout=0.5))
    tree = {"params": params | {"b": jnp.ones((4, 6))}}
    still = module.apply(tree, x)
    np.testing.assert_array_equal(still, module.apply(tree, x, deterministic=True))
    train = jax.jit(jax.vmap(lambda key: module.apply(tree, x, deterministic=False, rngs={"dropout": key})))
    drop = train(jax.random.split(jax.random.key(0), 300))
    assert np.abs(drop[0] - drop[1]).max() > 0.1
    assert np.abs(np.mean(drop, axis=0) - still).max() < 0.2 * np.abs(still).max()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"dropout": 1.0}, r"lie in \[0, 1\)"),
        ({"targets": ()}, "at least one"),
    ],
)
def test_lora_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**({"rank": 2, "alpha": 1.0} | change))


def test_lora_refuses_targets_that_the_decoder_does_not_have():
    lora = LoraConfig(rank=2, alpha=2.0, targets=("q", "query"))
    with pytest.raises(ValueError, match=r"unknown LoRA targets \['query'\]"):
        LanguageConfig(vocab=8, width=16, layers=1, heads=1, kv_heads=1, mlp=8, rope_sections=(2, 3, 3), lora=lora)


class Beside(nn.Module):
    """Two layers of which the config may adapt one."""

    lora: LoraConfig | None

    def setup(self):
        self.up, self.out = Dense(6, ("embed", "mlp"), "float32"), Dense(4, ("mlp", "embed"), "float32")
        self.up_lora, self.out_lora = adapter("up", self.up, self.lora), adapter("out", self.out, self.lora)

    def __call__(self, x):
        return plus(self.out, self.out_lora, plus(self.up, self.up_lora, x))


def test_adapters_made_in_setup_stand_beside_the_layers_that_are_targeted():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.float32)
    config = LoraConfig(rank=2, alpha=4.0, targets=("out",))
    params = nn.unbox(Beside(config).init(jax.random.key(0), x))["params"]
    assert params.keys() == {"up", "out", "out_lora"} and params["out_lora"]["a"].shape == (6, 2)
    plain = {name: params[name] for name in ("up", "out")}
    expected = Beside(None).apply({"params": plain}, x)
    np.testing.assert_array_equal(Beside(config).apply({"params": params}, x), expected)
    a, b = params["out_lora"]["a"], jnp.ones((2, 4), jnp.float32)
    trained = Beside(config).apply({"params": params | {"out_lora": {"a": a, "b": b}}}, x)
    hidden = x @ params["up"]["kernel"]
    np.testing.assert_allclose(trained - expected, 2.0 * hidden @ a @ b, rtol=1e-5, atol=1e-5)
