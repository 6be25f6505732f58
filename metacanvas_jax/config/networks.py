"""The networks of an experiment."""

from typing import Any

import flax.linen as nn

from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.connectors.canvas import CanvasConnector
from metacanvas_jax.connectors.context import ContextConnector
from metacanvas_jax.connectors.queries import Queries
from metacanvas_jax.dit.flux.network import Flux, FluxConfig
from metacanvas_jax.dit.sana.network import Sana, SanaConfig
from metacanvas_jax.dit.wan.network import Wan, WanConfig
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.mllm.canvas import CanvasTokens
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig, Qwen25VL
from metacanvas_jax.text.gemma2.network import Gemma2
from metacanvas_jax.vae.dc_ae.network import DcAe, DcAeConfig
from metacanvas_jax.vae.kl.network import Kl, KlConfig
from metacanvas_jax.vae.patch_pca.network import PatchPca, PatchPcaConfig
from metacanvas_jax.vae.wan.network import WanVae, WanVaeConfig

DITS: dict[str, tuple[type, type[nn.Module]]] = {
    "sana": (SanaConfig, Sana),
    "flux": (FluxConfig, Flux),
    "wan": (WanConfig, Wan),
}
VAES: dict[str, tuple[type, type[nn.Module]]] = {
    "patch_pca": (PatchPcaConfig, PatchPca),
    "dc_ae": (DcAeConfig, DcAe),
    "kl": (KlConfig, Kl),
    "wan": (WanVaeConfig, WanVae),
}


def network(config: Experiment) -> MetaCanvas | Qwen25VL:
    """The network of an experiment: MetaCanvas, or the MLLM alone where the MLLM is what trains."""
    mllm = MllmConfig(config.mllm.language, config.mllm.vision)
    if config.objective == "understand":
        return Qwen25VL(mllm)
    width = config.mllm.language.width
    canvas = connector = None
    if config.canvas is not None:
        canvas = CanvasTokens(config.canvas, width, config.mllm.language.dtype)
        connector = CanvasConnector(config.canvas_connector)
    return MetaCanvas(
        dit=transformer(config),
        mllm=Qwen25VL(mllm) if config.uses_mllm else None,
        context_connector=None if config.context_connector is None else ContextConnector(config.context_connector),
        canvas=canvas,
        canvas_connector=connector,
        queries=None if config.queries is None else Queries(config.queries, width, config.mllm.language.dtype),
        text=None if config.text is None else Gemma2(config.text.encoder, config.text.length),
    )


def transformer(config: Experiment) -> Any:
    """The diffusion transformer of an experiment."""
    return _module(config.dit, DITS)


def autoencoder(config: Experiment) -> Any:
    """The autoencoder of an experiment."""
    return _module(config.vae, VAES)


def _module(config: Any, table: dict[str, tuple[type, type[nn.Module]]]) -> nn.Module:
    return next(module for cls, module in table.values() if isinstance(config, cls))(config)
