"""The way back: an exported folder, a connector's state dict, or adapters, as a run that training can go on from.

The run has one checkpoint, with a fresh optimizer and without a position in the data. `metacanvas train --workdir RUN`
goes on from its step with the data from their beginning, `metacanvas train --config.start=RUN` begins another run with
its parameters, and `sample`, `evaluate` and `export` take it as any other.
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from metacanvas_jax import files
from metacanvas_jax.config.load import write_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.weights import weight_folders
from metacanvas_jax.errors import Unreachable, UserError
from metacanvas_jax.exchange import parts as layout
from metacanvas_jax.exchange.export_run import INDEX, RUN_CONFIG, VERSION
from metacanvas_jax.exchange.import_lora import is_adapter, read_adapters
from metacanvas_jax.train import parameters
from metacanvas_jax.train.checkpoints import save_imported
from metacanvas_jax.train.job import fit_config, make_job
from metacanvas_jax.trees import flat, nested, partition
from metacanvas_jax.types import Params
from metacanvas_jax.weights.hf_export import new_folder
from metacanvas_jax.weights.hf_import import load_params
from metacanvas_jax.weights.table import Entry, published_shape

STATE_DICTS = (".pt", ".pth", ".bin")


def import_run(source: str | os.PathLike, to: str | os.PathLike, config: ConfigDict | None = None) -> Path:
    """Makes a run of an exported folder, of a connector's state dict (``.pt``, or a folder of torch's DCP), or of
    adapters of a DiT (``import_lora.py``).

    ``config`` is that of the run to be; without it the one in the exported folder. The other two need one, and what
    they do not hold starts as the config says.

    Raises:
        UserError: none of the three; tensors that are missing, left over or of another shape; a folder ``to`` that has
            contents; frozen weights that the config names and that are not there.
    """
    source, to = files.folder(source), files.folder(to)
    exported = (source / INDEX).is_file()
    if (source / "model_index.json").is_file():
        parts = ", ".join(sorted(path.parent.name for path in source.glob("*/config.json")))
        raise UserError(f"{source} is a pipeline of diffusers; import one of its folders: {parts}")
    if config is None:
        if not exported:
            raise UserError(f"{source} is no exported folder: say with --config what it shall become")
        config = ConfigDict(files.read_json(source / RUN_CONFIG))
    setup = experiment(config)
    trainable, _ = partition(parameters.param_shapes(setup), setup.train.rules)
    with new_folder(to, inside=True) as draft:
        if exported:
            params, step = read_exported(source, setup, trainable), read_index(source)["step"]
        else:
            read = read_adapters if is_adapter(source) else read_connector
            params, step = _completed(setup, trainable, read(source, setup, trainable)), 0
        job = make_job(setup)
        save_imported(draft, job, fit_config(setup), params, step, str(source))
        write_config(config, draft)  # last: a folder without it is no run
    return to


def read_index(folder: Path) -> dict[str, Any]:
    """The index of an exported folder. Raises UserError for one of another version."""
    index = files.read_json(folder / INDEX)
    if index.get("version") != VERSION:
        raise UserError(f"{folder / INDEX}: version {index.get('version')!r}, expected {VERSION}")
    return index


def read_exported(folder: Path, setup: Experiment, trainable: Params) -> Params:
    """What trains, from an exported folder; ``trainable`` are its shapes.

    Raises UserError for a folder whose parts are not those of ``setup``, or whose tensors do not fit.
    """
    wanted, found = flat(trainable), {}
    for part in layout.parts(setup, list(wanted)):
        if not (folder / part.folder).is_dir():
            have = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
            raise UserError(f"{folder}: no {part.folder} in it, which {setup.name} trains; it has {have}")
        table = [entry for entry in part.table if entry.path in wanted]
        left_out = [name for e in part.table if e.path not in wanted for i in e.tensors for name in e.names(i)]
        structs = nested({entry.path: wanted[entry.path] for entry in table})
        found |= flat(load_params(part.weights(folder), table, structs, ignore=left_out, progress=False))
    return nested({path: found[path] for path in wanted})


def read_connector(source: Path, setup: Experiment, trainable: Params) -> Params:
    """The connector's parameters from a state dict in the names of ``torch_export/connector.py``.

    Raises UserError for tensors that are missing, unknown or of another shape, and for a file that holds more than
    tensors: nothing but weights is ever unpickled.
    """
    wanted = flat(trainable)
    part = next((p for p in layout.parts(setup, list(wanted)) if p.folder == layout.CONNECTOR), None)
    if part is None:
        raise UserError(f"{setup.name} has no connector")
    state = read_state_dict(source)
    leaves = {entry.path: _tensor(state, entry, wanted[entry.path], source) for entry in part.table}
    if state:
        raise UserError(f"{source}: {min(state)} is no tensor of this connector")
    return nested(leaves)


def _tensor(state: dict[str, np.ndarray], entry: Entry, struct: Any, source: Path) -> jax.Array:
    expected = published_shape(entry, struct.shape)
    if entry.name not in state:
        raise UserError(f"{source}: {entry.name} is missing (expected shape {list(expected)})")
    value = state.pop(entry.name)
    if value.shape != expected:
        raise UserError(f"{source}: {entry.name} has shape {list(value.shape)}, expected {list(expected)}")
    return jnp.asarray(np.ascontiguousarray(entry.transform.forward(value.astype(np.float32))))


def read_state_dict(source: Path) -> dict[str, np.ndarray]:
    """Tensors of a ``.pt`` file or of a DCP folder, in float32, taken out of ``state_dict`` or ``model``.

    Raises UserError for what is neither, and for a file that holds anything but tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError("reading a state dict needs torch: pip install 'metacanvas_jax[torch]'") from error

    if source.is_dir() and (source / ".metadata").is_file():
        from metacanvas_jax.torch_export.dcp import read_dcp

        with files.local_copy(source) as near:
            values: Any = read_dcp(near)
    elif source.suffix in STATE_DICTS and source.is_file():
        try:
            with files.local_copy(source.parent, source.name) as near:
                values = torch.load(near / source.name, map_location="cpu", weights_only=True)
        except Unreachable:
            raise
        except Exception as error:  # torch raises many types for a file that is not what it should be
            raise UserError(f"{source} holds more than weights, or is damaged; only tensors are read") from error
    else:
        raise UserError(
            f"{source}: expected an exported folder, a DCP folder, a state dict ({', '.join(STATE_DICTS)}) or adapters "
            "(.safetensors)"
        )
    for name in ("state_dict", "model"):
        values = values.get(name, values) if isinstance(values, Mapping) else values
    if not isinstance(values, Mapping) or not all(isinstance(v, torch.Tensor) for v in values.values()):
        raise UserError(f"{source}: expected a dict of tensors")
    return {name.removeprefix("module."): tensor.float().numpy() for name, tensor in values.items()}


def _completed(setup: Experiment, trainable: Params, known: Params) -> Params:
    """The parameters that a state dict did not hold, from the weights the config names, or else as a run starts."""
    wanted, have = flat(trainable), flat(known)
    missing = [path for path in wanted if path not in have]
    if missing:
        parts, whole = {path.partition("/")[0] for path in missing}, parameters.param_shapes(setup)
        found = {part: s.load(whole[part]) for part, s in weight_folders(setup).items() if part in parts}
        loaded = {path: leaf for path, leaf in flat(found).items() if path in missing}
        others = [path for path in missing if path not in loaded]
        have |= loaded | parameters.some(partial(parameters.initial, setup), jax.random.key(setup.seed), others)
    return nested({path: have[path] for path in wanted})
