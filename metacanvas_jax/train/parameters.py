"""All parameters of an experiment: their shapes, their random start, and the weights that a run starts with."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from metacanvas_jax import files, registry, tasks
from metacanvas_jax.config import read, weights
from metacanvas_jax.config.load import read_config
from metacanvas_jax.config.networks import autoencoder, keep_float32, mllm_config, network
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.weights import weight_folders
from metacanvas_jax.connectors import published as connector_weights
from metacanvas_jax.connectors.context import ContextConnectorConfig
from metacanvas_jax.data.inputs import prompter
from metacanvas_jax.data.shapes import latent_grid, smallest_inputs
from metacanvas_jax.errors import UserError
from metacanvas_jax.seals import json_hash
from metacanvas_jax.tasks import GivenLatents
from metacanvas_jax.train.store import Store
from metacanvas_jax.trees import flat, nested, partition, stays_float32, trains, without
from metacanvas_jax.types import MllmInputs, Params
from metacanvas_jax.weights import identity


def initial(experiment: Experiment, key: Key[Array, ""], model: Any = None) -> Params:
    """All parameters with their logical axes: the model's and, beside them under ``vae``, the autoencoder's.

    ``model`` is the network where it is not that of the config.
    """
    model = network(experiment) if model is None else model
    inputs = smallest_inputs(experiment)
    if experiment.objective == "understand":
        width = experiment.mllm.language.width
        written = jnp.zeros((1, 1, width)), jnp.zeros((3, 1, 1), jnp.int32)
        return model.init(key, inputs, *written)["params"]
    vae = autoencoder(experiment)
    size = experiment.shapes[0].size
    latents = jnp.zeros((1, 1, *latent_grid(experiment)[1:], vae.channels), jnp.float32)
    given = tasks.for_dit(GivenLatents(), latents, channels=experiment.given_channels, guidance=experiment.dit_guidance)
    keys = {"params": key, "dropout": key}
    params = model.init(keys, inputs, latents, jnp.ones((1,), jnp.float32), given)["params"]
    vae_params = vae.init(key, jnp.zeros((1, 1, *size, 3), jnp.float32))["params"]
    return params | {"vae": vae_params}


@functools.lru_cache(maxsize=4)
def boxed(experiment: Experiment) -> Params:
    """All parameters as shapes with their logical axes. Nothing is computed."""
    return jax.eval_shape(lambda key: initial(experiment, key), jax.random.key(0))


def unread(experiment: Experiment) -> tuple[str, ...]:
    """Regular expressions of parameters that no program of a training that paints reads: where frozen, none holds them.

    They are the head of the MLLM, which writes no words then, and its vision tower, where no task shows it a picture.
    Previews and evaluators draw the tasks of the training's own buckets (`data/by_size.py:looked_at`).
    """
    if experiment.objective != "paint":
        return ()
    sees = any(tasks.TASKS[bucket.task].mllm != "nothing" for bucket in experiment.shapes)
    return ("mllm/language/head/.*",) if sees else ("mllm/language/head/.*", "mllm/vision/.*")


def sides(experiment: Experiment, params: Params) -> tuple[Params, Params]:
    """(trainable, frozen) of all parameters, as a training holds them."""
    trainable, frozen = partition(params, experiment.train.rules)
    return trainable, without(frozen, unread(experiment))


def param_shapes(experiment: Experiment) -> Params:
    """All parameters as shapes. Nothing is computed."""
    return nn.meta.unbox(boxed(experiment))


def some(
    init: Callable[[Key[Array, ""]], Params], key: Key[Array, ""], paths: Iterable[str], shardings: Any = None
) -> dict[str, Array]:
    """The parameters of some paths as ``init(key)`` makes them; the others are not computed."""
    wanted = tuple(paths)

    def made(key: Key[Array, ""]) -> dict[str, Array]:
        leaves = flat(nn.meta.unbox(init(key)))
        return {path: leaves[path] for path in wanted}

    return jax.jit(made, out_shardings=shardings)(key) if wanted else {}


def check_memory(abstract: Mapping[str, Any]) -> None:
    """Raises UserError, naming the largest, when parameters by path need more memory than a CPU machine has."""
    if jax.default_backend() != "cpu":
        return  # an accelerator says so itself
    sizes = {path: math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in abstract.items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sum(sizes.values()) > memory:
        largest = max(sizes, key=lambda path: sizes[path])
        raise UserError(
            f"the parameters need {sum(sizes.values()) / 1e9:.3g} GB and this machine has {memory / 1e9:.3g} GB; "
            f"the largest is {largest} {list(abstract[largest].shape)}"
        )


def start_weights(experiment: Experiment, abstract: Params) -> Params:
    """The parameters of ``abstract`` that are not random: what the run ``start`` trained, else what folders hold.

    A canvas with a ``start`` that no other run trained begins as the embeddings of that text. ``abstract`` may be any
    part of the experiment's parameters; nothing else is read, and nothing twice.

    Raises UserError when something is not there, or that run has none of this one's parameters or one of another shape,
    or the canvas another number of tokens than its text.
    """
    loaded = _run_or_folders(experiment, abstract)
    if experiment.canvas is not None and experiment.canvas.start and "canvas" in abstract and "canvas" not in loaded:
        mllm = loaded["mllm"] if "mllm" in loaded else read_folders(experiment, {"mllm": abstract["mllm"]})["mllm"]
        loaded = loaded | {"canvas": {"tokens": first_canvas(experiment, mllm, abstract["canvas"]["tokens"])}}
    return loaded


def first_canvas(experiment: Experiment, mllm: Params, canvas: Any) -> Array:
    """Canvas tokens, of the shape and sharding of ``canvas``, that are the embeddings of ``canvas.start``.

    Raises UserError for another number of tokens.
    """
    tokens = prompter(experiment).text(experiment.canvas.start)[None]
    if tokens.size != math.prod(canvas.shape[:-1]):
        raise UserError(
            f"config: canvas.start has {tokens.size} tokens, expected {math.prod(canvas.shape[:-1])}: one for each "
            "token of the canvas"
        )
    model = registry.module(mllm_config(experiment))
    positions = jnp.zeros((3, *tokens.shape), jnp.int32)  # the first layer adds them, embeddings have none
    inputs = MllmInputs(jnp.asarray(tokens), positions, jnp.ones(tokens.shape, bool), ())

    def embedded(params: Params) -> Array:
        states = model.apply({"params": params}, inputs, method="embed")
        return states.reshape(canvas.shape).astype(jnp.float32)

    return jax.jit(embedded, out_shardings=getattr(canvas, "sharding", None))(mllm)


def _run_or_folders(experiment: Experiment, abstract: Params) -> Params:
    """The parameters of ``abstract`` that another run trained or folders hold."""
    if not experiment.start:
        return read_folders(experiment, abstract)
    run, known = files.folder(experiment.start), flat(abstract)
    before = read.experiment(read_config(run))
    trained = flat(partition(param_shapes(before), before.train.rules)[0])
    here = trained.keys() & known.keys()
    for path in sorted(here):
        if trained[path].shape != known[path].shape:
            both = f"{trained[path].shape} there and {known[path].shape} here"
            raise UserError(f"{run}, the config's 'start': {path} has shape {both}")
    if not here and not trained.keys() & flat(param_shapes(experiment)).keys():
        raise UserError(f"{run} trained nothing that this run has; it is the config's 'start'")
    loaded = flat(read_folders(experiment, nested({path: x for path, x in known.items() if path not in here})))
    if here:
        wanted = nested({path: known.get(path, leaf) for path, leaf in trained.items()})
        with Store(run / "checkpoints", writable=False) as checkpoints:
            loaded |= flat(checkpoints.restore_params(wanted, ema=before.train.ema is not None, only=here))
    return nested(loaded)


def identities(experiment: Experiment, *, whole: bool = False, there: bool = False) -> dict[str, str]:
    """Part of the model to what tells its frozen weights from others, as ``config.weights.identities`` returns it.

    What another run trained and this one keeps frozen is the part "start". A context connector is a part where it is
    frozen: one that trains only begins with published weights.
    """
    found = weights.identities(experiment, whole=whole, there=there)
    run, kept = files.folder(experiment.start), _kept_connector(experiment)
    if kept is not None and (not there or files.folder(kept.weights).exists()):
        found["context_connector"] = connector_weights.identify(kept, whole=whole)
    if not experiment.start or (there and not run.exists()):
        return found
    before = read.experiment(read_config(run))
    trained = flat(partition(param_shapes(before), before.train.rules)[0])
    frozen = flat(partition(param_shapes(experiment), experiment.train.rules)[1])
    if here := trained.keys() & frozen.keys():
        with Store(run / "checkpoints", writable=False) as checkpoints:
            sums = checkpoints.meta()["checksums"]
        name = "params" if before.train.ema is None else "ema"
        found["start"] = identity.record(json_hash({path: sums.get(f"{name}/{path}") for path in here}), "", "")
    return found


def without_lost_start(experiment: Experiment, recorded: Mapping[str, str]) -> Experiment:
    """The experiment of a trained run without its ``start``, where that run is gone and nothing of it is needed.

    ``recorded`` is what a checkpoint says of its frozen weights (``identities``). What it kept frozen of the run it
    began from is the part "start"; all else of that run was trained on and is in the checkpoint itself. An older
    checkpoint does not record that part: for it the run is needed.
    """
    gone = experiment.start and not (files.folder(experiment.start) / "config.json").exists()
    says = any(value.startswith(identity.FORM) for value in recorded.values())
    return dataclasses.replace(experiment, start="") if gone and says and "start" not in recorded else experiment


def _kept_connector(experiment: Experiment) -> ContextConnectorConfig | None:
    """The context connector, where its published weights, or some of them, stay as they are."""
    config = experiment.context_connector
    paths = [f"context_connector/{entry.path}" for entry in connector_weights.table()]
    if config is None or not config.weights or all(trains(path, experiment.train.rules) for path in paths):
        return None
    return config


def read_folders(experiment: Experiment, abstract: Params) -> Params:
    """The parameters of ``abstract`` that the folders of the experiment hold, with its shapes and shardings.

    ``abstract`` may be any part of the experiment's parameters; nothing else is read. They are cast to the dtypes of
    ``as_held`` while they are read.
    """
    wanted, context = as_held(experiment, abstract), experiment.context_connector
    found = {part: source.load(wanted[part]) for part, source in weight_folders(experiment).items() if part in wanted}
    if context is not None and context.weights and "context_connector" in wanted:
        found["context_connector"] = connector_weights.load(context, wanted["context_connector"])
    return found


def as_held(experiment: Experiment, abstract: Params) -> Params:
    """Abstract parameters in the dtype a training holds them in: frozen ones in its frozen dtype, others in float32.

    Frozen ones that match ``keep_float32`` are float32, too. What is narrower already stays so.
    """
    train, kept = experiment.train, keep_float32(experiment)

    def held(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        wide = trains(path, train.rules) or stays_float32(path, kept)
        dtype = jnp.dtype("float32" if wide else train.frozen_dtype)
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize < dtype.itemsize:
            dtype = leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=getattr(leaf, "sharding", None))

    return nested({path: held(path, leaf) for path, leaf in flat(abstract).items()})


def chosen(weights: Params, wanted: Params, where: object) -> Params:
    """The leaves of ``weights`` that ``wanted`` has. Raises UserError for one that is missing."""
    have = flat(weights)
    if missing := [path for path in flat(wanted) if path not in have]:
        raise UserError(f"{where}: no weights for the frozen parameter {missing[0]} ({len(missing)} are missing)")
    return nested({path: have[path] for path in flat(wanted)})
