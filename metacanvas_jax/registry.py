"""Every network of the project, by family and name. A new one is its folder and one line here."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from metacanvas_jax import files
from metacanvas_jax.diffusion import schedules
from metacanvas_jax.dit.flux.record import RECORD as FLUX
from metacanvas_jax.dit.flux2.record import RECORD as FLUX2
from metacanvas_jax.dit.qwen_image.record import RECORD as QWEN_IMAGE
from metacanvas_jax.dit.sana.record import RECORD as SANA
from metacanvas_jax.dit.wan.record import RECORD as WAN
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.qwen2_5_vl.record import RECORD as QWEN2_5_VL
from metacanvas_jax.mllm.qwen3_vl.record import RECORD as QWEN3_VL
from metacanvas_jax.text.gemma2.record import RECORD as GEMMA2
from metacanvas_jax.text.qwen3.record import RECORD as QWEN3
from metacanvas_jax.types import Params
from metacanvas_jax.vae.dc_ae.record import RECORD as DC_AE
from metacanvas_jax.vae.flux2.record import RECORD as FLUX2_VAE
from metacanvas_jax.vae.kl.record import RECORD as KL
from metacanvas_jax.vae.patch_pca.record import RECORD as PATCH_PCA
from metacanvas_jax.vae.wan.record import RECORD as WAN_VAE
from metacanvas_jax.weights.published import model_name, read_all, read_json, subfolder
from metacanvas_jax.weights.record import Family, Network, Sampling

NETWORKS: tuple[Network, ...] = (
    *(SANA, FLUX, WAN, QWEN_IMAGE, FLUX2),
    *(PATCH_PCA, DC_AE, KL, WAN_VAE, FLUX2_VAE),
    *(GEMMA2, QWEN3),
    *(QWEN2_5_VL, QWEN3_VL),
)

SCHEDULES = {"linear": lambda steps, shift, tokens: schedules.linear(steps, shift)} | {
    name: make for network in NETWORKS for name, make in network.schedules.items()
}
"""Schedules of the noise levels by their name in a config: ``make(steps, shift, tokens)``.

Another one is "dynamic", ``schedules.dynamic``, which reads more of a config.
"""


def family(name: Family) -> dict[str, Network]:
    """The networks of a family by their ``kind`` in a config."""
    return {network.name: network for network in NETWORKS if network.family == name}


def of(config: Any) -> Network:
    """The network whose config this is."""
    return next(network for network in NETWORKS if isinstance(config, network.config))


def module(config: Any) -> Any:
    """The Linen module of a config."""
    return of(config).module(config)


def abstract_params(config: Any) -> Params:
    """Shapes of all parameters of a network, without making any."""
    arguments = of(config).arguments(config)
    return nn.meta.unbox(jax.eval_shape(module(config).init, jax.random.key(0), *arguments))["params"]


def published_config(folder: str | Path, *families: Family) -> Any:
    """The config of the network in a published folder, which must be of one of ``families`` (any unless given).

    Raises UserError for a folder of another model, or of a variant that is not built here.
    """
    file = files.folder(folder) / "config.json"
    name = model_name(read_json(file))
    known = {
        name: network
        for network in NETWORKS
        if network.read is not None and (not families or network.family in families)
        for name in (network.published, *network.also_published)
    }
    if name not in known:
        raise UserError(f"{file}: the model is {name or 'not named'}, expected {' or '.join(known)}")
    return known[name].config_in(folder)


def check_folder(folder: str | Path, config: Any, key: str) -> None:
    """Raises UserError unless a published folder holds the network of ``config``; ``key`` names it in messages."""
    of(config).check(folder, config, key)


def published_sampling(pipeline: str | Path, dit: Network | None = None) -> Sampling:
    """What the scheduler in a published pipeline is in a config, as the record of its transformer reads it.

    Another record reads a scheduler that ``dit`` does not name.

    Raises UserError for a scheduler that is not rebuilt here.
    """
    file = subfolder(pipeline, "scheduler") / "scheduler_config.json"
    values = read_json(file)
    asked = (*reversed(NETWORKS), *(() if dit is None else (dit,)))  # the last one decides
    readers = {name: read for network in asked for name, read in network.samplings.items()}
    name = values.get("_class_name")
    if name not in readers:
        raise UserError(f"{file}: the scheduler is {name}, expected {' or '.join(sorted(readers))} with flow sigmas")
    return read_all(file, values, name, readers[name])
