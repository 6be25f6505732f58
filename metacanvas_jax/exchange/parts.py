"""What an exported folder consists of: which parameters of a run go into which files, under which names.

The same list serves export, import and the tests of names and shapes at full size.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from metacanvas_jax import registry
from metacanvas_jax.config.networks import mllm_config
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.connectors import table as metacanvas
from metacanvas_jax.errors import UserError
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.weights import lora
from metacanvas_jax.weights.table import Entry, under

CONNECTOR, MLLM, TRANSFORMER, TEXT_ENCODER = "connector", "mllm", "transformer", "text_encoder"
MLLM_LORA, TRANSFORMER_LORA, TRANSFORMER_PARTIAL = "mllm_lora", "transformer_lora", "transformer_partial"
DIFFUSERS_STEM = "diffusion_pytorch_model"


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


def transformer_lora(setup: Experiment) -> LoraConfig | None:
    """The adapters of a run's transformer."""
    return getattr(setup.dit, "lora", None)


def parts(setup: Experiment, trained: Sequence[str]) -> list[Part]:
    """The parts of a run's export; ``trained`` are the paths of the parameters that trained.

    Raises UserError for a trained parameter that no part has a place for.
    """
    paths = set(trained)
    if setup.objective == "understand":
        mllm = mllm_config(setup)
        found = [Part(MLLM, "model", tuple(registry.of(mllm).table(mllm)))]
        paths -= {path for path in paths if "_lora/" in path}  # adapters act on a canvas, and there is none
    else:
        found = _painter(setup, paths)
    left = paths - set().union(*(part.paths for part in found))
    if left:
        raise UserError(f"{setup.name} trains {min(left)}, and an export has no place for it")
    return found


def _painter(setup: Experiment, paths: set[str]) -> list[Part]:
    own = metacanvas.table(
        canvas=setup.canvas_connector,
        context=setup.context_connector,
        queries=setup.queries is not None,
        added=registry.of(setup.dit).added(setup.dit),
    )
    found = [Part(CONNECTOR, "model", tuple(own))] if own else []
    adapters, mllm = setup.mllm.language.lora, mllm_config(setup)
    if adapters is not None and any(path.startswith("mllm/") and "_lora/" in path for path in paths):
        table = under(lora.peft_table(registry.of(mllm).adapted(mllm), adapters), "mllm/")
        found.append(Part(MLLM_LORA, "adapter_model", tuple(table), sharded=False))
    base = under(registry.of(setup.dit).table(setup.dit), "dit/")
    adapters = transformer_lora(setup)
    if adapters is not None:
        table = lora.table(base, adapters, lora.DIFFUSERS)
        found.append(Part(TRANSFORMER_LORA, "pytorch_lora_weights", tuple(table), sharded=False))
    trained = tuple(entry for entry in base if entry.path in paths)
    if trained:
        folder = TRANSFORMER if len(trained) == len(base) else TRANSFORMER_PARTIAL
        found.append(Part(folder, DIFFUSERS_STEM, trained))
    return found


def fresh(setup: Experiment, found: Sequence[Part]) -> list[Part]:
    """Networks that stay frozen as the run made them: no folder of weights has them, so that they go along whole.

    ``found`` are the parts of what trained. A transformer of which only some trains goes along whole, too.
    """
    if setup.objective != "paint":
        return []
    made, there = [], {part.folder for part in found}
    if setup.uses_mllm and not setup.mllm.weights:
        mllm = mllm_config(setup)
        made.append(Part(MLLM, "model", tuple(under(registry.of(mllm).table(mllm), "mllm/"))))
    if setup.text is not None and not setup.text.weights:
        encoder = setup.text.encoder
        made.append(Part(TEXT_ENCODER, "model", tuple(under(registry.of(encoder).table(encoder), "text/"))))
    if not setup.dit_weights:
        made.append(Part(TRANSFORMER, DIFFUSERS_STEM, tuple(under(registry.of(setup.dit).table(setup.dit), "dit/"))))
    return [part for part in made if part.folder not in there]
