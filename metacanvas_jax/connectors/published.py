"""Published weights of the context connector: the two-layer MLP of UniWorld-V1, from which the paper starts (D.1).

Source: PKU-YuanGroup/UniWorld-V1 (arXiv 2506.03147), ``univa/models/modeling_univa_denoise_tower.py``: the module
``denoise_projector`` is a linear layer from 3,584 to 12,288, SiLU, and a linear layer to 4,096, both with biases.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from metacanvas_jax.connectors.context import ContextConnectorConfig
from metacanvas_jax.errors import UserError
from metacanvas_jax.types import Params
from metacanvas_jax.weights import identity, published
from metacanvas_jax.weights.hashes import Distant, sampled_hash, whole_hash
from metacanvas_jax.weights.safetensors_io import Checkpoint
from metacanvas_jax.weights.table import Entry, linear

KEY = "context_connector.weights"
FIXED: dict[str, Any] = {"kind": "mlp", "activation": "silu", "out_norm": False}
"""Fields of ``ContextConnectorConfig`` that these weights decide; its sizes are compared with those of the tensors."""
PREFIXES = ("denoise_tower.denoise_projector.", "denoise_projector.", "")
"""What stands before ``0.weight`` in the whole model, in its denoise tower, and in a file of the connector alone."""


def table() -> list[Entry]:
    """The four tensors, and the parameters of ``ContextConnector`` that they are."""
    entries = [*linear("0", "fc1"), *linear("2", "fc2")]
    names = [tuple(prefix + entry.name for prefix in PREFIXES) for entry in entries]
    return [
        dataclasses.replace(entry, name=first, aliases=tuple(others))
        for entry, (first, *others) in zip(entries, names, strict=True)
    ]


def load(config: ContextConnectorConfig, abstract: Mapping[str, Any], **options: Any) -> Params:
    """The parameters of ``abstract`` from ``config.weights``: a safetensors file, or a folder of one model.

    Other tensors of that model are not read. ``options`` are those of ``hf_import.load_params``.

    Raises UserError for a file that is missing, has no such tensors, or tensors of other sizes.
    """
    try:
        return published.load(config.weights, table(), abstract, ("*",), **options)
    except UserError as error:
        raise UserError(f"{error}; {KEY} is to name the connector of UniWorld-V1") from error


def identify(config: ContextConnectorConfig, *, whole: bool = False) -> str:
    """What tells these weights from others (``weights/identity.py``); ``whole`` reads them whole."""
    weights = Checkpoint(config.weights)
    whole_read = whole_hash(_stored(weights)) if whole else ""
    return identity.record(sampled_hash(_stored(weights)), whole_read, "")


def _stored(weights: Checkpoint) -> Iterator[tuple[str, np.ndarray | Distant]]:
    """The connector's tensors under the same names wherever they lie."""
    paths = {name: entry.path for entry in table() for name in entry.names(None)}
    return ((paths[name], tensor) for name, tensor in identity.stored(weights, only=paths))
