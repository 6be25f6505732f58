"""The networks of an experiment."""

from typing import Any

from metacanvas_jax import registry
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.connectors.canvas import CanvasConnector
from metacanvas_jax.connectors.context import ContextConnector
from metacanvas_jax.connectors.queries import Queries
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.mllm.base import Mllm
from metacanvas_jax.mllm.canvas import CanvasTokens


def network(config: Experiment) -> MetaCanvas | Mllm:
    """The network of an experiment: MetaCanvas, or the MLLM alone where the MLLM is what trains."""
    if config.objective == "understand":
        return registry.module(mllm_config(config))
    width = config.mllm.language.width
    text = None
    if config.text is not None:
        text = registry.of(config.text.encoder).module(config.text.encoder, config.text.length)
    canvas = connector = None
    if config.canvas is not None:
        canvas = CanvasTokens(config.canvas, width, config.mllm.language.dtype)
        connector = CanvasConnector(config.canvas_connector)
    return MetaCanvas(
        dit=transformer(config),
        mllm=registry.module(mllm_config(config)) if config.uses_mllm else None,
        context_connector=None if config.context_connector is None else ContextConnector(config.context_connector),
        canvas=canvas,
        canvas_connector=connector,
        queries=None if config.queries is None else Queries(config.queries, width, config.mllm.language.dtype),
        text=text,
    )


def transformer(config: Experiment) -> Any:
    """The diffusion transformer of an experiment."""
    return registry.module(config.dit)


def autoencoder(config: Experiment) -> Any:
    """The autoencoder of an experiment."""
    return registry.module(config.vae)


def keep_float32(config: Experiment) -> tuple[str, ...]:
    """Regular expressions of parameters that stay float32 whatever ``train.frozen_dtype`` is."""
    parts = {"mllm": mllm_config(config), "dit": config.dit, "vae": config.vae}
    parts["text"] = None if config.text is None else config.text.encoder
    records = {part: registry.of(network) for part, network in parts.items() if network is not None}
    return tuple(f"{part}/{regex}" for part, record in records.items() for regex in record.keep_float32)


def mllm_config(config: Experiment) -> Any:
    """The MLLM of an experiment as its network is configured."""
    return registry.family("mllm")[config.mllm.kind].config(config.mllm.language, config.mllm.vision)
