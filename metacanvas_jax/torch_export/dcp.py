"""Sharded checkpoints of torch (DCP), without trusting them: of their pickled metadata only its own types pass."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from metacanvas_jax.errors import UserError

METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = {
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((METADATA, f"{name}StorageMetadata") for name in ("Tensor", "Bytes", "Chunk")),
    (METADATA, "TensorProperties"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}


class _Unpickler(pickle.Unpickler):
    """Makes nothing but places of tensors: none of its types does anything when it is made."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata")


class WeightsReader(FileSystemReader):
    """A reader with safe metadata; the files of the tensors are read with ``weights_only`` by torch itself."""

    def read_metadata(self, *arguments: object, **options: object) -> Metadata:
        """The table of contents. Raises UserError if it could run code, or is damaged."""
        file = Path(self.path) / ".metadata"
        try:
            with open(file, "rb") as stream:
                found = _Unpickler(stream).load()
        except Exception as error:  # a damaged pickle can raise almost anything
            raise UserError(f"{file} holds more than the places of tensors, or is damaged: {error}") from error
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


def read_dcp(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, by name."""
    reader = WeightsReader(folder)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(state, storage_reader=reader, no_dist=True)
    return state
