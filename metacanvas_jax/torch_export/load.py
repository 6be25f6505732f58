"""Reading an exported folder, and finding the bases it was trained beside."""

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from metacanvas_jax import files
from metacanvas_jax.dit.torch_side import Backbone
from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.torch_export import sides
from metacanvas_jax.torch_export.connector import Connector
from metacanvas_jax.torch_export.lora import Adapters, read_diffusers, read_peft

INDEX, VERSION = "metacanvas.json", 1


def read_index(folder: Path) -> dict[str, Any]:
    """The index of an exported folder. Raises UserError for a folder that is none, or of another version."""
    if not (folder / INDEX).exists():
        raise UserError(f"{folder}: no {INDEX} in it; expected a folder written by `metacanvas export`")
    index = files.read_json(folder / INDEX)
    if index.get("format") != "metacanvas" or index.get("version") != VERSION:
        raise UserError(f"{folder / INDEX}: expected format 'metacanvas' of version {VERSION}")
    return index


def read_shards(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    """All tensors of a folder, of one file or of several with an index."""
    index = folder / f"{stem}.safetensors.index.json"
    names = {f"{stem}.safetensors"}
    if index.is_file():
        names = set(files.read_json(index)["weight_map"].values())
    return {key: tensor for name in sorted(names) for key, tensor in load_file(folder / name).items()}


@contextlib.contextmanager
def described(folder: Path) -> Iterator[None]:
    """Turns what a damaged or foreign folder leads to into a UserError of one line that names it."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what is missing or of another type or shape: the libraries have an error for each
        raise UserError(f"{folder} cannot be read as an export: {type(error).__name__}: {first_line(error)}") from error


class Finder:
    """Loads the parts of an export: what lies in its folder, and what lies in its bases."""

    def __init__(
        self, folder: Path, index: Mapping[str, Any], base: str | Path | None, dtype: torch.dtype, device: torch.device
    ):
        self.folder, self.index, self.base = folder, index, None if base is None else Path(base)
        self.dtype, self.device = dtype, device

    def connector(self) -> Connector:
        """Canvas tokens and connectors."""
        config = files.read_json(self.folder / "connector" / "config.json")
        with torch.device("meta"):
            connector = Connector(config)
        state = read_shards(self.folder / "connector", "model") if connector.state_dict() else {}
        self._load(connector, state, self.folder / "connector")
        return connector.to(self.device, self.dtype).eval()

    def mllm(self, given: Any) -> Any:
        """The MLLM with its adapters and its tokenizer."""
        section = self.index["mllm"]
        side = sides.named("mllm", section.get("kind"))
        source = self._source(given, section, "mllm", None)
        model = source
        if isinstance(source, Path):
            model = self._as_frozen(self._pretrained(side.model, source)).to(self.device)
        adapters = None
        if section["lora"] is not None:
            adapters = Adapters(model, *read_peft(self.folder / section["lora"])).to(self.device, self.dtype)
        places = [self.folder / "tokenizer", source] if isinstance(source, Path) else [self.folder / "tokenizer"]
        place = next((place for place in places if (place / "tokenizer.json").is_file()), None)
        if place is None:
            raise UserError(f"no tokenizer.json in {' or '.join(map(str, places))}")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(place, local_files_only=True)
        return side(model.eval(), tokenizer, adapters)

    def backbone(self, given: Any, connector: Connector) -> Backbone:
        """The diffusion transformer beside its connector."""
        side = sides.named("dit", self.index["backbone"])
        return side(self._transformer(given, side), connector, self.index["settings"], self.dtype)

    def _transformer(self, given: Any, side: type[Backbone]) -> nn.Module:
        """The diffusion transformer: the exported one, or a base with what was trained put on it."""
        section = self.index["transformer"]
        source = self._source(given, section, "transformer", "transformer")
        model = source
        if isinstance(source, Path):
            model = self._pretrained(side.model, source)
            model = model if section["folder"] else self._as_frozen(model, "transformer")
        if section["partial"] is not None:
            state = read_shards(self.folder / section["partial"], "diffusion_pytorch_model")
            wrong = model.load_state_dict(state, strict=False).unexpected_keys
            if wrong:
                raise UserError(f"the transformer {source} has no tensor {wrong[0]}, which was trained here")
        model = model.to(self.device).eval()
        if section["lora"] is not None:
            Adapters(model, *read_diffusers(self.folder / section["lora"])).to(self.device, self.dtype)
        return model

    def vae(self, given: Any) -> Any:
        """The autoencoder; None if there is none: latents can be had without it."""
        section = self.index["vae"]
        side = sides.named("vae", section["kind"])
        if side.model is None:  # the project's own, which an export holds itself
            folder = section["folder"]
            return (
                None if folder is None else self._as_frozen(side.from_pretrained(self.folder / folder)).to(self.device)
            )
        if given is None and self._place(section, "vae") is None:
            return None
        source = self._source(given, section, "vae", "vae")
        model = self._as_frozen(self._pretrained(side.model, source)) if isinstance(source, Path) else source
        return side(model.to(self.device).eval())

    def text(self, given: Any) -> Any:
        """The text encoder that a transformer keeps for itself; its tokenizer lies in it or beside it."""
        side = sides.named("text", self.index["text"].get("kind"))
        source = self._source(given, self.index["text"], "text_encoder", "text_encoder")
        if not isinstance(source, Path):
            raise UserError("text_encoder must be a folder, with its tokenizer in it or in tokenizer/ beside it")
        beside = source.parent / "tokenizer"
        inside = (source / "tokenizer.json").is_file() or not beside.is_dir()
        tokenizer = AutoTokenizer.from_pretrained(source if inside else beside, local_files_only=True)
        model = self._as_frozen(self._pretrained(side.model, source)).to(self.device).eval()
        return side(model, tokenizer, self.index["text"])

    def _place(self, section: Mapping[str, Any], subfolder: str | None) -> Path | None:
        if section.get("folder") is not None:
            return self.folder / section["folder"]
        if subfolder is not None and self.base is not None and (self.base / subfolder).is_dir():
            return self.base / subfolder
        recorded = Path(section["base"]) if section.get("base") else None
        if recorded is not None and (recorded / (subfolder or "") / "config.json").is_file():
            return recorded / (subfolder or "")
        return recorded if recorded is not None and (recorded / "config.json").is_file() else None

    def _source(self, given: Any, section: Mapping[str, Any], name: str, subfolder: str | None) -> Any:
        """A model that was passed, or the folder of one. Raises UserError if there is none."""
        if isinstance(given, nn.Module):
            return given
        place = self._place(section, subfolder) if given is None else Path(given)
        if place is None:
            beside = f" (it was trained beside {section['base']})" if section.get("base") else ""
            raise UserError(f"{self.folder} needs a base that is not part of it: pass {name}=FOLDER{beside}")
        if subfolder is not None and (place / subfolder / "config.json").is_file():
            place = place / subfolder
        if not (place / "config.json").is_file():
            raise UserError(f"{name}: {place} has no config.json; expected a model folder")
        return place

    def _pretrained(self, cls: Any, folder: Path) -> nn.Module:
        name = "dtype" if cls.__module__.startswith("transformers") else "torch_dtype"
        try:
            return cls.from_pretrained(folder, local_files_only=True, **{name: self.dtype})
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{folder} cannot be read as a {cls.__name__}: {first_line(error)}") from error

    def _as_frozen(self, model: Any, part: str = "") -> Any:
        """The model with its weights rounded to the dtype in which the run kept what it froze."""
        computed = self.index.get("computed", {})
        kept = computed.get("float32_weights", {}).get(part, [])
        dtype = getattr(torch, computed.get("frozen_weights", "float32"))
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not any(fnmatch.fnmatchcase(name, pattern) for pattern in kept):
                parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        return model

    def _load(self, module: nn.Module, state: dict[str, torch.Tensor], where: Path) -> None:
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise UserError(f"{where}: {'; '.join(str(error).splitlines()[1:3]).strip()}") from error
