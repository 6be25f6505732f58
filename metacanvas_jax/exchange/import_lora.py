"""Adapters that others trained for a DiT: their files in diffusers' and the community's formats, as parameters.

diffusers reads the formats (``diffusion_model.`` and ``lora_unet_`` names, ``.alpha``, kohya, xlabs) and renames all.
What is done here is the rest: the adapters of the config may have a larger rank, another scale and more targets than
those of the file.
"""

import inspect
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metacanvas_jax import files, registry
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.exchange import parts as layout
from metacanvas_jax.train import parameters
from metacanvas_jax.trees import flat, nested
from metacanvas_jax.types import Params
from metacanvas_jax.weights import lora
from metacanvas_jax.weights.table import Entry

WEIGHTS = "pytorch_lora_weights.safetensors"
A, B = ".lora_A.weight", ".lora_B.weight"

Tensors = dict[str, np.ndarray]


def is_adapter(source: Path) -> bool:
    """Whether this is a file of adapters, or a folder of diffusers with one."""
    return source.suffix == ".safetensors" or (source / WEIGHTS).is_file()


def read_adapters(source: Path, setup: Experiment, trainable: Params) -> Params:
    """The adapters of ``dit.lora`` with the values of a file; ``trainable`` are the shapes of all that trains.

    A layer of the config that the file does not adapt starts as a new adapter, whose output is zero. So does what a
    rank has more than the file's.

    Raises UserError for a file that is damaged or of another network, or adapts layers that the config does not, and
    for a larger rank than the config's.
    """
    config = layout.transformer_lora(setup)
    if config is None:
        raise UserError(f"{source} holds adapters of a DiT, and dit.lora of {setup.name} is empty: give its config one")
    base = [entry for part in layout.parts(setup, list(flat(trainable))) for entry in part.table]
    entries = {entry.path: entry for entry in base if entry.name.startswith(lora.DIFFUSERS)}
    if not entries:
        raise UserError(f"{setup.name} trains no adapters of the DiT, which {source} holds: see train.rules")
    state, scales = _read(source, registry.of(setup.dit).name)
    new = parameters.some(partial(parameters.initial, setup), jax.random.key(setup.seed), entries)
    leaves = {path: np.array(value) for path, value in new.items()}
    for path, entry in entries.items():
        if path.endswith("/a"):
            _fill(state, scales, entry, entries[f"{path[:-2]}/b"], leaves, config.alpha / config.rank, source)
    if state:
        layer = min(state).removeprefix(lora.DIFFUSERS)
        raise UserError(
            f"{source}: {layer} is no layer that dit.lora of {setup.name} targets; check targets, or the network"
        )
    return nested({path: jnp.asarray(value) for path, value in leaves.items()})


def _fill(
    state: Tensors,
    scales: Mapping[str, float],
    a: Entry,
    b: Entry,
    leaves: Tensors,
    scale: float,
    source: Path,
) -> None:
    """Puts the matrices of one kind of layer, which are taken out of ``state``, into the parameters."""
    for number, index in enumerate(a.tensors):
        name = a.names(index)[0].removesuffix(A)
        if f"{name}{A}" not in state:
            continue
        down, up = state.pop(f"{name}{A}"), state.pop(f"{name}{B}", None)
        ours_a, ours_b = (e.transform.backward(leaves[e.path][number]).copy() for e in (a, b))
        rank = len(down)
        if rank > len(ours_a):
            raise UserError(
                f"{source}: {name} has rank {rank}, dit.lora.rank is {len(ours_a)}; set it to at least {rank}"
            )
        fits = (
            up is not None and down.shape[1:] == ours_a.shape[1:] and up.shape == (len(ours_b), rank, *ours_b.shape[2:])
        )
        if not fits:
            found = [list(down.shape), None if up is None else list(up.shape)]
            raise UserError(
                f"{source}: {name} has matrices {found}, expected those of a layer {list(ours_b.shape[:1])}"
            )
        ours_a[:rank] = down
        ours_b[:, :rank] = up * (scales.get(name, 1.0) / scale)
        leaves[a.path][number] = a.transform.forward(ours_a)
        leaves[b.path][number] = b.transform.forward(ours_b)


def _read(source: Path, network: str) -> tuple[Tensors, dict[str, float]]:
    """Matrices by diffusers' names, float32, and ``alpha / rank`` of each layer that does not have 1."""
    try:
        from metacanvas_jax.torch_export import sides
    except ImportError as error:
        raise UserError("reading adapters needs diffusers: pip install 'metacanvas_jax[torch]'") from error
    file = source / WEIGHTS if source.is_dir() else source
    load = sides.named("dit", network).adapters.lora_state_dict
    alphas = {"return_alphas": True} if "return_alphas" in inspect.signature(load).parameters else {}
    try:
        with tempfile.TemporaryDirectory() as home:
            near = file if files.is_local(file) else Path(home) / file.name
            if near != file:
                files.download(file, near)
            about = {"weight_name": file.name, "local_files_only": True, "return_lora_metadata": True}
            read = load(str(near.parent), **about, **alphas)
    except Exception as error:  # its converters raise whatever a name or a shape that they do not expect leads to
        raise UserError(f"{source}: diffusers reads no adapters of {network} from it ({first_line(error)})") from error
    state, metadata = read[0], read[-1] or {}
    state = {key: value.float().numpy() for key, value in state.items() if key.startswith(lora.DIFFUSERS)}
    return state, _scales(state, read[1] or {} if alphas else {}, metadata)


def _scales(state: Tensors, alphas: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, float]:
    """``alpha / rank`` by layer: of the file's metadata, of its ``.alpha`` values, or 1 where it says neither."""
    about = {key.removeprefix(lora.DIFFUSERS): value for key, value in metadata.items()}
    patterns, found = about.get("alpha_pattern") or {}, {}
    for layer in (key.removesuffix(A) for key in state if key.endswith(A)):
        rank = len(state[f"{layer}{A}"])
        alpha = patterns.get(layer.removeprefix(lora.DIFFUSERS), about.get("lora_alpha", alphas.get(f"{layer}.alpha")))
        if alpha is not None:
            found[layer] = float(alpha) / rank
    return found
