"""What the rest of the project knows of one network: the record that its folder gives to ``registry.py``."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn

from metacanvas_jax import files
from metacanvas_jax.diffusion.schedules import DynamicShift
from metacanvas_jax.errors import UserError
from metacanvas_jax.limits import out_of_range
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.types import Params
from metacanvas_jax.weights import published
from metacanvas_jax.weights.published import Fields
from metacanvas_jax.weights.table import Entry

Family = Literal["dit", "vae", "mllm", "text"]


class Sampling(NamedTuple):
    """What a published scheduler is in a config: fields of its section ``sampler``, under their names there."""

    schedule: str
    method: str
    shift: float
    dynamic: DynamicShift = DynamicShift()


@dataclasses.dataclass(frozen=True)
class NativePrompt:
    """The prompt of a published pipeline whose text encoder is an MLLM; it opens the assistant's turn at its end.

    ``skip`` is a field of the context connector's config, the others are those of ``MllmSection``.
    """

    system: str
    skip: int
    image_label: str = ""
    image_tokens: int = 0  # 0: it has no images


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How the published pipeline of a DiT paints by default.

    ``bucket(config, spatial)`` is the task and the shape, for an autoencoder with ``spatial`` pixels per latent.
    ``guidance`` is the scale of classifier-free guidance, ``rescale`` that of ``SamplerSection``, and ``dit_guidance``
    the scale that a guidance-distilled DiT reads. ``prompts`` are those of published pipelines whose text encoder is an
    MLLM that is built here, by the class that ``model_index.json`` names.
    ``text_encoder`` says that the pipeline's own text encoder is built here, of which the DiT reads ``text_length``
    states. ``indexed`` gives the fields that a pipeline has otherwise, by the values of its ``model_index.json``.
    """

    steps: int
    guidance: float
    bucket: Callable[[Any, int], Bucket]
    dit_guidance: float | None = None
    rescale: bool = False
    text_encoder: bool = False
    text_length: int = 300
    indexed: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda index: {}
    prompts: Mapping[str, NativePrompt] = dataclasses.field(default_factory=dict)


def _no_entries(config: Any) -> list[Entry]:
    del config
    return []


def _nothing_beside(folder: Path, config: Any, media: Mapping[str, Any]) -> None:
    del folder, config, media


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of one family.

    ``name`` is its ``kind`` in a config, ``config`` the dataclass of its sizes and ``module`` the Linen class, of which
    ``module(config)`` is the network. ``arguments`` gives the smallest arguments with which ``init`` makes every
    parameter.

    ``tiny`` are the fields of a network so small that a CPU trains it; those of a DiT read text states of width 64.

    The published form: ``published`` is the class of diffusers, or the model type of transformers, that ``config.json``
    names (empty: there is none); ``also_published`` are other classes whose files have the same form. ``read`` and
    ``write`` translate that file, ``table`` lists its tensors, and ``ignore`` gives patterns of published tensors that
    are not used here. ``subfolder`` is where a pipeline of diffusers keeps it. ``free`` are fields of the config that
    no published file decides. ``sizes`` corrects the sizes that are compared with a published folder. ``added`` lists
    the tensors of layers that a config adds to the published network. ``keep_float32`` are regular expressions of whole
    paths of parameters: these stay float32 when a run keeps frozen ones in another dtype, as the reference keeps them.
    ``beside(folder, config, media)`` refuses other files of a published folder that ask for what is not built here.
    ``settings`` are fields that `configs/published.py` sets on top of the published sizes; those of an MLLM belong to
    its section of a config.

    ``licence`` gives the name and the terms of what is published: of a DiT together with its autoencoder.

    Of a DiT: ``schedules`` by their names in the config; each takes ``(steps, shift, tokens)``, with the number of
    latent patch tokens. ``samplings`` reads diffusers' schedulers, by class name. ``pipeline`` holds the defaults of
    the published pipeline. Of an MLLM: ``adapted`` lists the tensors beside which adapters may stand, and ``media`` are
    the fields of ``mllm/media.py:MediaConfig`` with which it was trained. Of a text encoder: ``rows(tokenizer, n)``
    makes the ``n`` tokens of a prompt and their mask; without it prompts are worded as in ``text/prompts.py``. Of an
    autoencoder that is fitted in closed form: ``fit(images, config)`` gives its parameters and its PSNR in decibels.
    """

    family: Family
    name: str
    config: type
    module: type[nn.Module]
    arguments: Callable[[Any], tuple[Any, ...]]
    tiny: Mapping[str, Any]
    published: str = ""
    also_published: tuple[str, ...] = ()
    read: Callable[[Fields], Any] | None = None
    write: Callable[..., dict[str, Any]] | None = None
    table: Callable[[Any], Sequence[Entry]] | None = None
    ignore: Callable[[Any], tuple[str, ...]] = lambda config: ()
    subfolder: str = ""
    free: tuple[str, ...] = ()
    sizes: Callable[[Any, dict[str, Any]], dict[str, Any]] = lambda config, sizes: sizes
    added: Callable[[Any], list[Entry]] = _no_entries
    keep_float32: tuple[str, ...] = ()
    beside: Callable[[Path, Any, Mapping[str, Any]], None] = _nothing_beside
    schedules: Mapping[str, Callable[[int, float, int], Any]] = dataclasses.field(default_factory=dict)
    samplings: Mapping[str, Callable[[Fields], Sampling]] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pipeline: Pipeline | None = None
    licence: Callable[[Any], tuple[str, str]] | None = None
    adapted: Callable[[Any], Sequence[Entry]] | None = None
    media: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: Callable[[Any, int], Callable[[str], tuple[Any, Any]]] | None = None
    fit: Callable[[Any, Any], tuple[Params, float]] | None = None

    def config_in(self, folder: str | Path) -> Any:
        """The config of a published folder of this network.

        Raises UserError for a folder of another model, of a variant that is not built here, or with a key in its
        ``config.json`` that nothing reads.
        """
        file = files.folder(folder) / "config.json"
        values = published.read_json(file)
        name = published.model_name(values)
        if name not in (self.published, *self.also_published):
            raise UserError(f"{file}: the model is {name or 'not named'}, expected {self.published or self.name}")
        config = published.read_all(file, values, name, self.read)
        if found := out_of_range(config):
            raise UserError(f"{file}: {found}")
        self.beside(files.folder(folder), config, self.media)
        return config

    def check(self, folder: str | Path, config: Any, key: str) -> None:
        """Raises UserError naming the first size in which the network of a published folder differs from ``config``.

        ``key`` is the name of ``config`` in messages. The fields ``free`` are not compared.
        """
        theirs = self.config_in(folder)
        found, sizes = (self.sizes(config, published.sizes_of(each, self.free)) for each in (theirs, config))
        for name in sizes:
            if found[name] != sizes[name]:
                file = files.folder(folder) / "config.json"
                raise UserError(f"{file}: {name} is {found[name]}, the config's {key}.{name} is {sizes[name]}")

    def load(self, folder: str | Path, config: Any, abstract: Mapping[str, Any], key: str, **options: Any) -> Params:
        """The parameters that a published folder has, after ``check``. See ``published.load`` for the arguments."""
        self.check(folder, config, key)
        return published.load(folder, self.table(config), abstract, self.ignore(config), **options)
