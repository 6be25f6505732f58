"""A published folder of transformers or diffusers as parameters of this project: checked, renamed, in one file."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from metacanvas_jax.config.networks import DITS, VAES
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig, Qwen25VL, example
from metacanvas_jax.text.gemma2.network import Gemma2, Gemma2Config
from metacanvas_jax.train import store
from metacanvas_jax.types import Given, Params, States, Text
from metacanvas_jax.weights import published
from metacanvas_jax.weights.hf_export import new_folder


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model of transformers or diffusers."""
    return (folder / "config.json").is_file() and not (folder / "metrics.jsonl").exists()


def import_model(source: Path, to: Path) -> Path:
    """Reads a model, checks every tensor, and writes ``params.safetensors`` and ``params.json`` to a new folder.

    A config may name either folder as weights; this one needs no renaming at every start. The model is held in memory.

    Raises:
        UserError: a model that is not built here, tensors that are missing, left over or wrong, a folder with contents.
    """
    config = published.network_config(source)
    abstract = abstract_params(config)
    params = published.load(source, config, abstract, "model")
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    with new_folder(to, size) as draft:
        store.save_params(draft, params, {"source": str(source), "model": type(config).__name__})
    return to


def abstract_params(config: Any) -> Params:
    """Shapes of all parameters of a network, by the class of its config."""
    if isinstance(config, MllmConfig):
        network, arguments = Qwen25VL(config), example(config)
    elif isinstance(config, Gemma2Config):
        tokens = jnp.zeros((1, 1), jnp.int32)
        network, arguments = Gemma2(config), (Text(tokens, tokens == 0),)
    elif any(isinstance(config, cls) for cls, _ in VAES.values()):
        network = next(module for cls, module in VAES.values() if isinstance(config, cls))(config)
        arguments = (jnp.zeros((1, 1, config.spatial, config.spatial, 3)),)
    else:
        network = next(module for cls, module in DITS.values() if isinstance(config, cls))(config)
        arguments = _dit_arguments(config)
    return nn.meta.unbox(jax.eval_shape(network.init, jax.random.key(0), *arguments))["params"]


def _dit_arguments(config: Any) -> tuple[jax.Array, jax.Array, States, Given]:
    latents = jnp.zeros((1, 1, 4, 4, config.latent_channels))
    text, given = States(jnp.zeros((1, 1, config.context_width)), jnp.ones((1, 1), bool)), Given()
    if hasattr(config, "pooled_width"):
        given = Given(pooled=jnp.zeros((1, config.pooled_width)), guidance=jnp.ones((1,)) if config.guidance else None)
    return latents, jnp.ones((1,)), text, given
