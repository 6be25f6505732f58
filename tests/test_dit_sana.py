"""SANA against diffusers: values, gradients, names and shapes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from metacanvas_jax.ckpt.hf_import import load_params
from metacanvas_jax.ckpt.tables.sana import table
from metacanvas_jax.dit.sana import Sana, SanaConfig, sana_1_5_1600m, sana_600m, sana_1600m
from metacanvas_jax.types import Condition

TINY = SanaConfig(latent_channels=8, heads=4, head_width=16, cross_heads=2, layers=2, context_width=48, sample_size=8)
CASES = {
    "published": TINY,
    "qk_norm_and_positions": dataclasses.replace(TINY, qk_norm="across_heads", interpolation_scale=1.0),
    "patch_2": dataclasses.replace(TINY, patch=2),
}
GRID = (6, 10)  # not square, not the sample size


@dataclasses.dataclass
class Pair:
    """One network in both frameworks, and inputs for it."""

    net: Sana
    params: dict
    torch_net: object
    latents: np.ndarray  # [b 1 h w c]
    time: np.ndarray
    context: np.ndarray
    mask: np.ndarray
    names: dict  # torch name -> path


def torch_kwargs(c: SanaConfig) -> dict:
    return {
        "in_channels": c.latent_channels,
        "out_channels": c.latent_channels,
        "num_attention_heads": c.heads,
        "attention_head_dim": c.head_width,
        "num_layers": c.layers,
        "num_cross_attention_heads": c.cross_heads,
        "cross_attention_head_dim": c.width // c.cross_heads,
        "cross_attention_dim": c.width,
        "caption_channels": c.context_width,
        "mlp_ratio": c.mlp_ratio,
        "sample_size": c.sample_size,
        "patch_size": c.patch,
        "interpolation_scale": c.interpolation_scale,
        "qk_norm": None if c.qk_norm is None else "rms_norm_across_heads",
    }


def abstract_params(c: SanaConfig):
    latents = jax.ShapeDtypeStruct((1, 1, 4 * c.patch, 4 * c.patch, c.latent_channels), jnp.float32)
    context = jax.ShapeDtypeStruct((1, 3, c.context_width), jnp.float32)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)

    def init(latents, time, context):
        return Sana(c).init(jax.random.key(0), latents, time, Condition(context))["params"]

    return nn.meta.unbox(jax.eval_shape(init, latents, time, context))


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module", params=CASES)
def pair(request, torch, tmp_path_factory) -> Pair:
    from diffusers import SanaTransformer2DModel
    from torch_support import randomize

    config = CASES[request.param]
    torch_net = randomize(SanaTransformer2DModel(**torch_kwargs(config)))
    folder = tmp_path_factory.mktemp(request.param)
    torch_net.save_pretrained(folder)
    rng = np.random.default_rng(0)
    return Pair(
        net=Sana(config),
        params=load_params(folder, table(config), abstract_params(config)),
        torch_net=torch_net,
        latents=rng.standard_normal((2, 1, *GRID, config.latent_channels), np.float32),
        time=np.array([0.999, 0.2505], np.float32),
        context=rng.standard_normal((2, 7, config.context_width), np.float32),
        mask=np.array([[True] * 7, [True] * 4 + [False] * 3]),
        names={entry.path: entry for entry in table(config)},
    )


def run_torch(torch, pair: Pair, masked: bool):
    mask = torch.from_numpy(pair.mask.astype(np.int64)) if masked else None
    out = pair.torch_net(
        torch.from_numpy(pair.latents[:, 0]).permute(0, 3, 1, 2),
        encoder_hidden_states=torch.from_numpy(pair.context),
        timestep=torch.from_numpy(1000.0 * pair.time),
        encoder_attention_mask=mask,
    ).sample
    return out.permute(0, 2, 3, 1)[:, None]


def relative(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


@pytest.mark.torch
@pytest.mark.parametrize("masked", [True, False], ids=["masked_captions", "no_mask"])
def test_velocity_equals_diffusers(torch, pair, masked):
    with torch.no_grad():
        expected = run_torch(torch, pair, masked).numpy()
    condition = Condition(jnp.asarray(pair.context), jnp.asarray(pair.mask) if masked else None)
    actual = jax.jit(pair.net.apply)(
        {"params": pair.params}, jnp.asarray(pair.latents), jnp.asarray(pair.time), condition
    )
    assert relative(actual, expected) <= 2e-5


@pytest.mark.torch
@pytest.mark.parametrize("pair", ["qk_norm_and_positions"], indirect=True)  # has every parameter; compiling is slow
def test_every_parameter_gradient_equals_torch_autograd(torch, pair):
    weights = np.random.default_rng(1).standard_normal(pair.latents.shape, np.float32)
    pair.torch_net.zero_grad()
    (run_torch(torch, pair, True) * torch.from_numpy(weights)).sum().backward()
    named = dict(pair.torch_net.named_parameters())

    @jax.jit
    def gradient(params):
        def loss(params):
            condition = Condition(jnp.asarray(pair.context), jnp.asarray(pair.mask))
            out = pair.net.apply({"params": params}, jnp.asarray(pair.latents), jnp.asarray(pair.time), condition)
            return jnp.sum(out * weights)

        return jax.grad(loss)(params)

    actual = flatten_dict(gradient(pair.params), sep="/")
    assert set(actual) == set(pair.names)
    largest = max(float(p.grad.abs().max()) for p in named.values())
    for path, entry in pair.names.items():
        tensors = [named[entry.name.format(i=i)].grad.numpy() for i in range(entry.layers or 1)]
        rearranged = [entry.transform.forward(x) for x in tensors]
        expected = rearranged[0] if entry.layers is None else np.stack(rearranged)
        # The key bias of a softmax attention has no gradient but rounding.
        assert np.abs(actual[path] - expected).max() <= 1e-4 * np.abs(expected).max() + 1e-7 * largest, path


@pytest.mark.torch
@pytest.mark.parametrize(
    ("config", "count"),
    [(sana_1600m(), 1_604_462_752), (sana_600m(), None), (sana_1_5_1600m(), None)],
    ids=["1600m", "600m", "1.5_1600m"],
)
def test_full_size_names_and_shapes_equal_diffusers(torch, config, count):
    from diffusers import SanaTransformer2DModel

    with torch.device("meta"):
        published = SanaTransformer2DModel(**torch_kwargs(config)).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in published.items()}
    params = flatten_dict(abstract_params(config), sep="/")
    actual = {}
    for entry in table(config):
        shape = params.pop(entry.path).shape
        one = np.broadcast_to(np.float32(0), shape[1:] if entry.layers else shape)
        for i in range(entry.layers or 1):
            actual[entry.name.format(i=i)] = entry.transform.backward(one).shape
        assert entry.layers in (None, shape[0])
    assert not params
    assert actual == expected
    assert count in (None, sum(int(np.prod(shape)) for shape in actual.values()))


@pytest.mark.torch
def test_transforms_of_the_table_are_undone_exactly(torch, pair):
    for entry in pair.names.values():
        tensor = pair.torch_net.state_dict()[entry.name.format(i=0)].numpy()
        assert np.array_equal(entry.transform.backward(entry.transform.forward(tensor)), tensor), entry.name


@pytest.fixture(scope="module")
def tiny_params():
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_params(TINY))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": jnp.zeros((2, 3, 4, 4, 8))}, "one frame, not 3"),
        ({"latents": jnp.zeros((2, 1, 4, 4, 7))}, "8 channels, not 7"),
        ({"time": jnp.zeros((2, 1))}, "one noise level per sample"),
        ({"context": jnp.zeros((2, 3, 47))}, "width 48, not 47"),
        ({"guidance": jnp.zeros(2)}, "condition.guidance"),
        ({"pooled": jnp.zeros((2, 5))}, "condition.pooled"),
        ({"reference": (jnp.zeros((2, 1, 4, 4, 8)),)}, "condition.reference"),
    ],
    ids=["video", "channels", "time_per_frame", "context_width", "guidance", "pooled", "reference"],
)
def test_inputs_that_sana_cannot_use_raise(tiny_params, change, message):
    inputs = {"latents": jnp.zeros((2, 1, 4, 4, 8)), "time": jnp.zeros(2), "context": jnp.zeros((2, 3, 48))} | change
    latents, time = inputs.pop("latents"), inputs.pop("time")
    with pytest.raises(ValueError, match=message):
        Sana(TINY).apply({"params": tiny_params}, latents, time, Condition(**inputs), method="embed")


@pytest.mark.parametrize(
    "change",
    [
        {"cross_heads": 3},
        {"qk_norm": "per_head"},
        {"remat": "some"},
        {"head_width": 15, "cross_heads": 1, "heads": 1, "interpolation_scale": 1.0},
    ],
    ids=["cross_heads", "qk_norm", "remat", "odd_positions"],
)
def test_configs_that_do_not_fit_together_raise(change):
    with pytest.raises(ValueError, match="SanaConfig"):
        dataclasses.replace(TINY, **change)


def test_fresh_network_with_zero_out_predicts_zero_and_ignores_the_caption_in_its_blocks():
    config = dataclasses.replace(TINY, zero_init_out=True)
    net, key = Sana(config), jax.random.key(0)
    latents, time = jax.random.normal(key, (1, 1, 4, 4, 8)), jnp.array([0.5])
    one, other = (Condition(jax.random.normal(k, (1, 3, 48))) for k in jax.random.split(key))
    params = jax.jit(net.init)(key, latents, time, one)

    @jax.jit
    def tokens(condition):
        def inner(net):
            return net.run(net.embed(latents, time, condition), condition).grid

        return net.apply(params, method=inner)

    assert not np.any(net.apply(params, latents, time, one))
    assert np.array_equal(tokens(one), tokens(other))
