"""Folders of weights that a run starts from, whoever wrote them, streamed to the devices that hold them.

A folder is either one of ``train/saved.save`` (``params.safetensors`` and ``params.json``) or a published one of
transformers or diffusers (``config.json`` and safetensors; a pipeline of diffusers stands for its subfolder).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from metacanvas_jax.errors import UserError
from metacanvas_jax.types import Params
from metacanvas_jax.weights import hf_import, published
from metacanvas_jax.weights.record import Network
from metacanvas_jax.weights.safetensors_io import Checkpoint
from metacanvas_jax.weights.table import SAME, Entry

SAMPLED = 64  # tensors of which an identity reads some bytes
SAMPLE_BYTES = 256


@dataclasses.dataclass(frozen=True)
class Source:
    """The weights of one network of a config: ``key`` is where the config names the folder.

    ``network`` is its record and ``config`` its sizes.
    """

    key: str
    folder: Path
    network: Network
    config: Any

    @property
    def saved(self) -> bool:
        """Whether ``weights/saved.py`` wrote it."""
        return (self.folder / "params.json").is_file()

    @property
    def place(self) -> Path:
        """The folder that holds the files. Raises UserError if it is missing."""
        return self.folder if self.saved else published.subfolder(self.folder, self.network.subfolder)

    def load(self, abstract: Mapping[str, Any], **options: Any) -> Params:
        """The parameters that the folder has of ``abstract``, whose dtypes and shardings they get.

        A process reads the slices of its own devices only, casts them block by block and holds one tensor at a time
        (see ``hf_import.load_params``, which takes ``options``). What no published folder holds is left out; in a saved
        one ``abstract`` may be any part of what was saved.

        Raises:
            UserError: a folder that is missing, of another network, damaged or incomplete.
        """
        if not self.saved:
            return self.network.load(self.place, self.config, abstract, self.key, **options)
        targets = flatten_dict(dict(abstract), sep="/")
        weights = Checkpoint(self.folder / "params.safetensors")
        known = [path for path in targets if path in weights.tensors]
        if not {path.partition("/")[0] for path in targets} & {path.partition("/")[0] for path in weights.tensors}:
            raise UserError(f"{self.folder} ({self.key}): none of its parameters is one of the network's")
        table = [Entry(path, path, SAME) for path in known]
        held = unflatten_dict({path: targets[path] for path in known}, sep="/")
        return hf_import.load_params(weights, table, held, ignore=("*",), **options)

    def identity(self) -> str:
        """What tells these weights from others, without reading them all.

        For a saved folder the hash of its content, from its JSON. For a published one a hash over the headers (names,
        dtypes, shapes, places) and some bytes of up to ``SAMPLED`` tensors, so that a fine-tuned copy differs.
        """
        if self.saved:
            file = self.folder / "params.json"
            try:
                return str(json.loads(file.read_text())["hash"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file}: not the description of saved parameters ({error})") from error
        weights = Checkpoint(self.place)
        digest = hashlib.sha256()
        names = sorted(weights.tensors)
        for name in names:
            tensor = weights.tensors[name]
            digest.update(f"{name} {tensor.file.name} {tensor.dtype} {tensor.shape} {tensor.offset}\n".encode())
        for i in np.unique(np.linspace(0, len(names) - 1, min(SAMPLED, len(names))).astype(int)):
            tensor = weights.tensors[names[i]]
            with open(tensor.file, "rb") as file:
                file.seek(tensor.offset + tensor.nbytes // 2 // SAMPLE_BYTES * SAMPLE_BYTES)
                digest.update(file.read(min(SAMPLE_BYTES, tensor.nbytes)))
        return digest.hexdigest()
