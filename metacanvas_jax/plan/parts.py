"""To which part of MetaCanvas an operation belongs, told by the names of modules in its scope."""

import re

from metacanvas_jax import registry

VAE = "VAE"
VAES = "|".join(network.module.__name__ for network in registry.family("vae").values())
CANVAS_WRITE, CANVAS_CONNECTOR = "canvas write", "canvas connector"
CANVAS_PARTS = (CANVAS_WRITE, CANVAS_CONNECTOR)
"""What a step has with a canvas and has not without."""

PARTS = (
    ("optimizer", re.compile(r"\b(optimizer|ema)\b")),
    (VAE, re.compile(rf"\b({VAES})\b")),
    ("text encoder", re.compile(r"\btext\.(encode|__call__)|/text/")),
    (CANVAS_WRITE, re.compile(r"mllm\.write|/canvas/")),
    (CANVAS_CONNECTOR, re.compile(r"canvas_connector")),
    ("context connector", re.compile(r"context_connector")),
    ("MLLM prefix", re.compile(r"mllm\.|MetaCanvas\.read")),
    ("DiT", re.compile(r"\bdit\b")),
)
ATTENTION = re.compile(r"\b(attend|linear_attend)\b|flash|splash")
OTHER = "other"


def part_of(scope: str, sort: str) -> str:
    """The part; the DiT is taken apart into attention, matmul and other by ``sort`` ("product", "kernel", ...).

    What lies in no module is the loss, the noise and the batch: "other".
    """
    name = next((name for name, pattern in PARTS if pattern.search(scope)), OTHER)
    if name != "DiT":
        return name
    if ATTENTION.search(scope):
        return "DiT attention"
    return "DiT matmul" if sort == "product" else "DiT other"


def is_recomputed(scope: str, name: str = "") -> bool:
    """A forward pass computed again for the gradient, by our own policy or by the compiler (``.remat``)."""
    return "rematted_computation" in scope or ".remat" in name
