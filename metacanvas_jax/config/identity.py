"""What decides the result of a run, in the form in which checkpoints store it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from metacanvas_jax.config.schema import Experiment, MllmSection, TextSection

HOW = frozenset({"remat", "chunk", "threads", "prefetch", "in_memory", "max_skips"})
"""Keys, at any depth, that say how a run computes and reads. They change its memory and speed, not its result."""


def deciding(tree: Any) -> Any:
    """A stored identity, or a part of one, without the keys of ``HOW``, which a run that continues may change."""
    if isinstance(tree, Mapping):
        return {key: deciding(value) for key, value in tree.items() if key not in HOW}
    return [deciding(value) for value in tree] if isinstance(tree, list | tuple) else tree


def identity(experiment: Experiment) -> dict[str, Any]:
    """What a resumed run must agree on: everything but how often it writes and where its files are."""
    tree = dataclasses.asdict(experiment)
    for name in ("optimizer", "eval", "sampler", "name", "mesh", "hardware"):
        tree.pop(name)
    train = tree.pop("train")
    tree["batch"] = train["batch"]
    for section, name in (
        ("data", "path"),
        ("data", "pictures_path"),
        ("mllm", "weights"),
        ("mllm", "tokenizer"),
        ("mllm", "context_cache"),
        ("mllm", "context_memory"),
    ):
        tree[section].pop(name)
    for name in ("vae_weights", "dit_weights", "start"):
        tree.pop(name)
    for name in ("weights", "tokenizer"):
        (tree["text"] or {}).pop(name, None)
    (tree["context_connector"] or {}).pop("weights", None)
    for source in tree["sources"]:
        for name in ("path", "cache", "in_memory", "latents"):
            source.pop(name)
        for name in ("validation", "by_size"):
            if not source[name]:
                source.pop(name)
    for bucket in tree["buckets"]:
        if not bucket["by_length"]:
            bucket.pop("by_length")
    # Checkpoints from before these keys existed were made with the values that are now their defaults.
    defaults = {
        "data": {"canvas_dropout": 0.0},
        "mllm": {
            "image_tokens": None,
            "video_pixels": None,
            "video_fps": 2.0,
            "kind": MllmSection.kind,
            "assistant": False,
            "image_label": "",
        },
        "text": {"kind": TextSection.kind},
        "canvas": {"start": "", "latents_per_cell": None},
        "context_connector": {"kind": "mlp", "skip": 0},
        "vae": {"folded": 2, "shortcuts": True},
        "dit": {"lora": None, "predicts": "velocity", "least_time": 0.05},
    }
    for section, values in defaults.items():
        for name, value in values.items():
            if tree[section] is not None and name in tree[section] and tree[section][name] == value:
                tree[section].pop(name)
    for name in ("text", "dit_guidance", "buckets", "sources", "facts"):
        if not tree[name]:
            tree.pop(name)
    return tree
