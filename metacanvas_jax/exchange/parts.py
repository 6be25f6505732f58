"""What an exported folder consists of: which parameters of a run go into which files, under which names.

The same list serves export, import and the tests of names and shapes at full size.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.connectors import table as metacanvas
from metacanvas_jax.dit.flux import table as flux
from metacanvas_jax.dit.flux.network import FluxConfig
from metacanvas_jax.dit.sana import table as sana
from metacanvas_jax.dit.sana.network import SanaConfig
from metacanvas_jax.dit.wan import table as wan
from metacanvas_jax.dit.wan.network import WanConfig
from metacanvas_jax.errors import UserError
from metacanvas_jax.exchange import reference_configs
from metacanvas_jax.mllm.qwen2_5_vl import table as qwen2_5_vl
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.weights import lora
from metacanvas_jax.weights.table import Entry, under

CONNECTOR, MLLM, TRANSFORMER = "connector", "mllm", "transformer"
MLLM_LORA, TRANSFORMER_LORA, TRANSFORMER_PARTIAL = "mllm_lora", "transformer_lora", "transformer_partial"
DIFFUSERS_STEM = "diffusion_pytorch_model"


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A transformer of diffusers: its name in the index, its weight table and its ``config.json``."""

    name: str
    table: Callable[[Any], list[Entry]]
    config: Callable[[Any], dict[str, Any]]


BACKBONES: dict[type, Backbone] = {
    SanaConfig: Backbone("sana", sana.table, reference_configs.sana),
    FluxConfig: Backbone("flux", flux.table, reference_configs.flux),
    WanConfig: Backbone("wan", wan.table, reference_configs.wan),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A folder of the export. Paths in ``table`` are those of the whole tree of parameters."""

    folder: str
    stem: str
    table: tuple[Entry, ...]
    sharded: bool = True

    @property
    def paths(self) -> set[str]:
        """The parameters that it holds."""
        return {entry.path for entry in self.table}

    def weights(self, export: Path) -> Path:
        """What to read its tensors from: the one file, or the folder of shards."""
        return export / self.folder if self.sharded else export / self.folder / f"{self.stem}.safetensors"


def backbone(setup: Experiment) -> Backbone:
    """How diffusers has the transformer of a run."""
    return BACKBONES[type(setup.dit)]


def transformer_lora(setup: Experiment) -> LoraConfig | None:
    """The adapters of a run's transformer."""
    return getattr(setup.dit, "lora", None)


def parts(setup: Experiment, trained: Sequence[str]) -> list[Part]:
    """The parts of a run's export; ``trained`` are the paths of the parameters that trained.

    Raises UserError for a trained parameter that no part has a place for.
    """
    paths = set(trained)
    mllm = MllmConfig(setup.mllm.language, setup.mllm.vision)
    if setup.objective == "understand":
        found = [Part(MLLM, "model", tuple(qwen2_5_vl.table(mllm)))]
        paths -= {path for path in paths if "_lora/" in path}  # adapters act on a canvas, and there is none
    else:
        found = _painter(setup, mllm, paths)
    left = paths - set().union(*(part.paths for part in found))
    if left:
        raise UserError(f"{setup.name} trains {min(left)}, and an export has no place for it")
    return found


def _painter(setup: Experiment, mllm: MllmConfig, paths: set[str]) -> list[Part]:
    own = metacanvas.table(
        canvas=setup.canvas_connector,
        context=setup.context_connector,
        queries=setup.queries is not None,
        dit=setup.dit,
    )
    found = [Part(CONNECTOR, "model", tuple(own))] if own else []
    adapters = mllm.language.lora
    if adapters is not None and any(path.startswith("mllm/") and "_lora/" in path for path in paths):
        table = under(lora.peft_table(qwen2_5_vl.language_table(mllm.language), adapters), "mllm/")
        found.append(Part(MLLM_LORA, "adapter_model", tuple(table), sharded=False))
    kind = backbone(setup)
    base = under(kind.table(setup.dit), "dit/")
    adapters = transformer_lora(setup)
    if adapters is not None:
        table = lora.table(base, adapters, lora.DIFFUSERS)
        found.append(Part(TRANSFORMER_LORA, "pytorch_lora_weights", tuple(table), sharded=False))
    trained = tuple(entry for entry in base if entry.path in paths)
    if trained:
        folder = TRANSFORMER if len(trained) == len(base) else TRANSFORMER_PARTIAL
        found.append(Part(folder, DIFFUSERS_STEM, trained))
    return found
