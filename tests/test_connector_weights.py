"""A context connector that starts from published weights: UniWorld-V1's, in the three layouts in which it is stored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments_support import miniature
from safetensors.numpy import save_file

from metacanvas_jax.config import load, read
from metacanvas_jax.config.identity import identity
from metacanvas_jax.connectors import published
from metacanvas_jax.connectors.context import ContextConnector
from metacanvas_jax.errors import UserError
from metacanvas_jax.train import parameters
from metacanvas_jax.trees import flat

IN, HIDDEN, OUT = 64, 96, 64  # the miniature's MLLM and DiT


def tensors(prefix: str = "", seed: int = 0) -> dict[str, np.ndarray]:
    """The connector's four tensors as PyTorch stores them."""
    rng = np.random.default_rng(seed)
    shapes = {"0.weight": (HIDDEN, IN), "0.bias": (HIDDEN,), "2.weight": (OUT, HIDDEN), "2.bias": (OUT,)}
    return {prefix + name: rng.standard_normal(shape, np.float32) / 8 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of the whole model: the connector lies beside tensors of other networks."""
    folder = tmp_path_factory.mktemp("UniWorld-V1")
    others = {"denoise_tower.siglip_projector.0.weight": np.ones((3, 2), np.float32), "lm_head.weight": np.ones((2, 2))}
    save_file(tensors("denoise_tower.denoise_projector.") | others, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def setup():
    setup = miniature("image_editing", "no_canvas")
    return dataclasses.replace(setup, mllm=dataclasses.replace(setup.mllm, weights=""), dit_weights="")


def with_weights(setup, place, **changes):
    values = {"hidden": HIDDEN, "activation": "silu", "weights": str(place)} | changes
    return dataclasses.replace(setup, context_connector=dataclasses.replace(setup.context_connector, **values))


def loaded(setup):
    return parameters.start_weights(setup, parameters.param_shapes(setup))["context_connector"]


@pytest.mark.parametrize("prefix", published.PREFIXES)
def test_a_training_starts_with_the_published_mlp(setup, prefix, tmp_path):
    stored = tensors(prefix)
    save_file(stored, tmp_path / "connector.safetensors")
    params = loaded(with_weights(setup, tmp_path / "connector.safetensors"))
    names = {path: stored[prefix + name] for path, name in (("fc1/bias", "0.bias"), ("fc2/bias", "2.bias"))}
    names |= {f"fc{n + 1}/kernel": stored[f"{prefix}{2 * n}.weight"].T for n in (0, 1)}
    assert {path: leaf.tolist() for path, leaf in flat(params).items()} == {p: x.tolist() for p, x in names.items()}


def test_its_values_are_those_of_the_published_mlp(setup, whole):
    setup = with_weights(setup, whole)
    states = np.random.default_rng(1).standard_normal((2, 5, IN), np.float32)
    found = ContextConnector(setup.context_connector).apply({"params": loaded(setup)}, jnp.asarray(states))
    weights = tensors()
    hidden = states.astype(np.float64) @ weights["0.weight"].T + weights["0.bias"]
    expected = (hidden / (1 + np.exp(-hidden))) @ weights["2.weight"].T + weights["2.bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 128}, r"denoise_projector.0.weight has shape \[96, 64\], expected \[128, 64\]"),
        ({"weights": "nowhere"}, "nowhere: no such file or folder; context_connector.weights is to name"),
        ({"weights": "empty"}, "denoise_tower.denoise_projector.0.weight or .* or 0.weight is missing"),
    ],
)
def test_weights_of_another_connector_are_one_line(setup, whole, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    save_file({"other": np.ones(2, np.float32)}, "empty")
    with pytest.raises(UserError, match=message) as caught:
        loaded(with_weights(setup, **{"place": whole} | {k.replace("weights", "place"): v for k, v in changes.items()}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["hidden=12288", "activation=gelu"], "context_connector.activation is 'gelu', expected 'silu'"),
        (["out_norm=True"], "context_connector.out_norm is True, expected False"),
        (["kind=identity", "hidden=None", "activation=gelu"], "context_connector.weights has no effect: .*'identity'"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(flags, message):
    flags = [f"--config.context_connector.{flag}" for flag in flags if flag != "hidden=None"]
    config = load.load_config("configs/image_editing.py", [*flags, "--config.context_connector.weights=weights/U"])
    if "identity" in message:
        config.context_connector.hidden, config.dit.context_width = None, config.mllm.language.width
    with pytest.raises(UserError, match=message):
        read.experiment(config)


def test_where_the_weights_lie_may_change_and_moves_with_the_others(setup):
    flags = ["--config.context_connector.weights=weights/U", "--config.paths.weights=/disk/weights"]
    moved = read.experiment(load.load_config("configs/image_editing.py", flags))
    assert moved.context_connector.weights == "/disk/weights/U"
    assert identity(with_weights(setup, "here")) == identity(with_weights(setup, "there"))


def test_only_a_connector_that_stays_as_published_is_part_of_what_a_checkpoint_knows(setup, whole, tmp_path):
    trained = with_weights(setup, whole)
    frozen = dataclasses.replace(
        trained, train=dataclasses.replace(trained.train, rules=(("context_connector/.*", "freeze"), (".*", "train")))
    )
    save_file(tensors(seed=1), tmp_path / "other.safetensors")
    save_file(tensors(), tmp_path / "same.safetensors")
    found = [
        parameters.identities(with_weights(frozen, place)).get("context_connector")
        for place in (whole, tmp_path / "same.safetensors", tmp_path / "other.safetensors")
    ]
    assert found[0] == found[1] != found[2]
    assert "context_connector" not in parameters.identities(trained)
    assert jax.tree.map(jnp.shape, loaded(frozen)) == jax.tree.map(jnp.shape, loaded(trained))
