"""The parts of MetaCanvas in a report. The names of modules in the scope of an operation decide its part."""

import re

from metacanvas_jax import registry

VAE = "VAE"
VAES = "|".join(network.module.__name__ for network in registry.family("vae").values())
CANVAS_WRITE, CANVAS_CONNECTOR = "canvas write", "canvas connector"
CANVAS_PARTS = (CANVAS_WRITE, CANVAS_CONNECTOR)
"""The parts that a step has only with a canvas."""

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
    """The part of an operation. ``sort`` ("product", "kernel", ...) splits the DiT into attention, matmul and other.

    Operations outside of all modules (loss, noise, batch) are "other".
    """
    name = next((name for name, pattern in PARTS if pattern.search(scope)), OTHER)
    if name != "DiT":
        return name
    if ATTENTION.search(scope):
        return "DiT attention"
    return "DiT matmul" if sort == "product" else "DiT other"


def is_recomputed(scope: str, name: str = "") -> bool:
    """Whether it is a recomputed forward pass, by the config's ``remat`` or by the compiler (``.remat``)."""
    return "rematted_computation" in scope or ".remat" in name
