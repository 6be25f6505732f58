"""Adapters: names of PEFT (language model) and of diffusers (transformers), and where they go.

A layer's adapter lies beside it, as ``<layer>_lora/a`` and ``<layer>_lora/b`` (``nn/lora.py``). Its matrix ``b`` makes
the layer's output channels and is rearranged as the layer's own kernel is. A layer whose input is rearranged says so
with ``Entry.adapter``.
"""

import dataclasses
from collections.abc import Sequence

from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.weights.table import LINEAR, POINTWISE, Entry

PEFT, DIFFUSERS = "base_model.model.", "transformer."


def table(base: Sequence[Entry], config: LoraConfig, prefix: str) -> list[Entry]:
    """Entries of the adapters beside the layers of ``base`` that the config targets."""
    entries = []
    for entry in base:
        layer, _, kind = entry.path.rpartition("/")
        if kind != "kernel" or entry.layers is None or layer.rpartition("/")[2] not in config.targets:
            continue
        name = prefix + entry.name.removesuffix(".weight")
        a, b = entry.adapter or (POINTWISE if entry.transform is POINTWISE else LINEAR, entry.transform)
        plain = dataclasses.replace(entry, aliases=(), adapter=None)
        entries += [
            dataclasses.replace(plain, name=f"{name}.lora_A.weight", path=f"{layer}_lora/a", transform=a),
            dataclasses.replace(plain, name=f"{name}.lora_B.weight", path=f"{layer}_lora/b", transform=b),
        ]
    return entries


def peft_table(base: Sequence[Entry], config: LoraConfig) -> list[Entry]:
    """The same for the language model, whose module names in memory are the aliases of its weight table."""
    in_memory = [dataclasses.replace(e, name=e.aliases[0], aliases=()) for e in base if e.aliases]
    return table(in_memory, config, PEFT)


def modules(entries: Sequence[Entry], prefix: str) -> list[str]:
    """Names of the layers that the entries adapt."""
    names = {name for e in entries for layer in e.tensors for name in e.names(layer)}
    return sorted({name.removeprefix(prefix).partition(".lora_")[0] for name in names})
