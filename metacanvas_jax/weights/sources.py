"""Folders of weights that a run starts from, whoever wrote them, streamed to the devices that hold them.

A folder is either one of ``weights/saved.save`` (``params.safetensors`` and ``params.json``) or a published one of
transformers or diffusers (``config.json`` and safetensors; a pipeline of diffusers stands for its subfolder).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from metacanvas_jax.errors import UserError
from metacanvas_jax.types import Params
from metacanvas_jax.weights import hf_import, identity, published, saved
from metacanvas_jax.weights.hashes import sampled_hash, whole_hash
from metacanvas_jax.weights.record import Network
from metacanvas_jax.weights.safetensors_io import Checkpoint
from metacanvas_jax.weights.table import SAME, Entry


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
        self.sampled()
        weights = self._weights()
        known = [path for path in targets if path in weights.tensors]
        if not {path.partition("/")[0] for path in targets} & {path.partition("/")[0] for path in weights.tensors}:
            raise UserError(f"{self.folder} ({self.key}): none of its parameters is one of the network's")
        table = [Entry(path, path, SAME) for path in known]
        held = unflatten_dict({path: targets[path] for path in known}, sep="/")
        return hf_import.load_params(weights, table, held, ignore=("*",), **options)

    def sampled(self) -> str:
        """A hash of some bytes of every tensor. Raises UserError when a saved folder does not hold what was saved."""
        found = sampled_hash(identity.stored(self._weights()))
        if self.saved and saved.described(self.folder)["sampled"] not in (None, found):
            raise self._damaged()
        return found

    def identity(self, *, whole: bool = False) -> str:
        """What tells these weights from others, as `weights/identity.py` describes it.

        Some bytes of every tensor are read; with ``whole`` all are. Raises UserError when those of a saved folder are
        not what was saved.
        """
        weights, sampled = self._weights(), self.sampled()
        content = whole_hash(identity.stored(weights)) if whole else ""
        if not self.saved:
            return identity.record(sampled, content, identity.before(weights))
        known = saved.described(self.folder)["hash"]
        if whole and content != known:
            raise self._damaged()
        return identity.record(sampled, known, known)

    def _weights(self) -> Checkpoint:
        return Checkpoint(self.folder / "params.safetensors" if self.saved else self.place)

    def _damaged(self) -> UserError:
        file = self.folder / "params.safetensors"
        return UserError(f"{file} ({self.key}) is damaged: its values are not those that params.json describes")
