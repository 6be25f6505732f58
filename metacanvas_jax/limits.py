"""The largest sizes that configs and published descriptions may ask for.

What is larger is a mistake or an attack. It is refused before a list or an array of that size is made.
"""

import dataclasses
from typing import Any

NUMBER = (1 << 31) - 1  # of any whole number, such as steps and samples
PUBLISHED = 1 << 24  # of any whole number in a published config.json that is used here

MOST = {
    **dict.fromkeys(
        (
            *("rows", "columns", "keyframes", "latents_per_cell", "patch", "folded", "temporal_patch", "merge"),
            *("threads", "unroll"),
        ),
        1024,
    ),
    **dict.fromkeys(("layers", "layers_double", "layers_single", "depth", "blocks", "heads", "kv_heads"), 1024),
    **dict.fromkeys(("cross_heads", "encoder_blocks", "decoder_blocks", "mlp_ratio", "vanilla_ratio"), 1024),
    **dict.fromkeys(("size", "cell", "sprite", "head_width", "rank", "recall", "accumulate", "sample_size"), 1 << 14),
    **dict.fromkeys(("width", "mlp", "hidden", "expansion", "channels", "groups", "multipliers", "freq"), 1 << 17),
    **dict.fromkeys(("length", "buckets", "frames", "per_category", "per_category_held_out"), 1 << 17),
    **dict.fromkeys(("image_tokens", "vocab", "batch"), 1 << 22),
    "sampler.steps": 10_000,
    "seed": (1 << 32) - 1,
}
"""The largest value by the name of a key, or by its last two names."""

CANVAS_TOKENS = 1 << 16


def most(key: str) -> int:
    """The largest value of a whole number with this dotted key."""
    section, _, name = key.rpartition(".")
    ends = f"{section.rpartition('.')[2]}.{name}"
    if name.endswith(("_width", "_channels")):
        return MOST["width"]
    return MOST.get(ends, MOST.get(name, NUMBER))


def out_of_range(config: Any, prefix: str = "") -> str | None:
    """The first size of a network's config that no network has, in words; None if there is none."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            if found := out_of_range(value, f"{prefix}{field.name}."):
                return found
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        numbers = [number for number in numbers if isinstance(number, int | float)]
        if max(numbers, default=0) > most(field.name):
            return f"{prefix}{field.name} is {max(numbers)}, at most {most(field.name)} is allowed"
        if any(isinstance(number, int) and number < 0 for number in numbers):
            return f"{prefix}{field.name} is {min(numbers)}, expected no negative number"
    return None
