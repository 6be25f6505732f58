"""Every backbone in miniature: what the contract tests run on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from metacanvas_jax.dit.flux.network import Flux, FluxConfig
from metacanvas_jax.dit.flux2.network import Flux2, Flux2Config
from metacanvas_jax.dit.qwen_image.network import QwenImage, QwenImageConfig
from metacanvas_jax.dit.sana.network import Sana, SanaConfig
from metacanvas_jax.dit.wan.network import Wan, WanConfig
from metacanvas_jax.types import Given, States, Tokens

BATCH, LENGTH = 2, 6


def draw(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A tiny network that reads ``States.mask``, and the shape of its latents without the batch."""

    net: type[nn.Module]
    config: Any
    grid: tuple[int, int, int, int]  # t h w c
    extra: Callable[[], dict] = dict  # fields of ``Given``
    frames: bool = False  # noise levels per frame

    def build(self, **changes) -> nn.Module:
        return self.net(dataclasses.replace(self.config, **changes))

    def inputs(self) -> tuple[jax.Array, jax.Array, States, Given]:
        """Latents, noise levels, a text whose second sample is padded, and what is given."""
        time = np.array([0.9, 0.35], np.float32)
        if self.frames:
            time = np.stack([0 * time, *[time] * (self.grid[0] - 1)], axis=1)
        mask = np.array([[True] * LENGTH, [True] * 4 + [False] * 2])
        states = draw(BATCH, LENGTH, self.config.context_width, seed=2)
        text, given = States(jnp.asarray(states), jnp.asarray(mask)), Given(**self.extra())
        return jnp.asarray(draw(BATCH, *self.grid, seed=1)), jnp.asarray(time), text, given

    def abstract(self) -> Any:
        """Parameter shapes with their logical axes."""
        return jax.eval_shape(self.build().init, jax.random.key(0), *self.inputs())["params"]

    def params(self) -> Any:
        """Random parameters of a sensible size; nothing is zero, so that no path is dead."""
        values = {}
        for seed, (path, x) in enumerate(flatten_dict(nn.meta.unbox(self.abstract())).items()):
            noise = draw(*x.shape, seed=seed)
            fan_in = x.shape[-2] if path[-1] == "kernel" else 10.0
            values[path] = jnp.asarray(1.0 + 0.2 * noise if path[-1] == "scale" else noise * fan_in**-0.5)
        return unflatten_dict(values)


def finish(net: nn.Module, params: Any, tokens: Tokens, text: States) -> jax.Array:
    """The velocity from tokens as ``embed`` makes them."""
    return net.apply({"params": params}, tokens, text, method=lambda net, *a: net.unembed(net.run(*a)))


BACKBONES = {
    "sana": Backbone(
        Sana,
        SanaConfig(latent_channels=4, heads=2, head_width=32, cross_heads=4, layers=2, context_width=16),
        (1, 4, 8, 4),
    ),
    "flux": Backbone(
        Flux,
        FluxConfig(
            latent_channels=4,
            layers_double=2,
            layers_single=2,
            heads=4,
            head_width=16,
            context_width=16,
            pooled_width=8,
            rope_axes=(4, 6, 6),
            mask_context=True,
        ),
        (1, 8, 8, 4),
        lambda: {
            "reference": (jnp.asarray(draw(BATCH, 1, 4, 8, 4, seed=3)),),
            "pooled": jnp.asarray(draw(BATCH, 8, seed=4)),
            "guidance": jnp.array([2.5, 3.5], jnp.float32),
        },
    ),
    "flux2": Backbone(
        Flux2,
        Flux2Config(
            latent_channels=4,
            layers_double=1,
            layers_single=1,
            heads=4,
            head_width=16,
            context_width=16,
            rope_axes=(4, 4, 4, 4),
        ),
        (1, 4, 4, 4),
        lambda: {"reference": (jnp.asarray(draw(BATCH, 1, 2, 4, 4, seed=3)),)},
    ),
    "qwen_image": Backbone(
        QwenImage,
        QwenImageConfig(
            latent_channels=4,
            layers=2,
            heads=4,
            head_width=16,
            context_width=16,
            rope_axes=(4, 6, 6),
            zero_cond_t=True,
        ),
        (1, 8, 8, 4),
        lambda: {"reference": (jnp.asarray(draw(BATCH, 1, 4, 8, 4, seed=3)),)},
    ),
    "wan": Backbone(
        Wan,
        WanConfig(
            latent_channels=4, heads=4, head_width=16, mlp=64, layers=2, context_width=16, freq=32, mask_context=True
        ),
        (3, 4, 8, 4),
        lambda: {"reference": (jnp.asarray(draw(BATCH, 1, 4, 8, 4, seed=3)),)},
        frames=True,
    ),
}
