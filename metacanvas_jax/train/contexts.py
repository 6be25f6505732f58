"""Training on stored contexts: the frozen MLLM reads every prompt once, not at every step.

A batch holds the MLLM's inputs (``READ``). ``stored_contexts`` replaces them by the ``context`` that the MLLM computes
from them. It comes from memory or a folder (``mllm/context_cache.py``); the first time it is computed on the mesh and
stored.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from metacanvas_jax.config.networks import network
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.weights import weight_folders
from metacanvas_jax.data.batch import Batch, mllm_inputs
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.context_cache import ContextCache
from metacanvas_jax.parallel.mesh import put_batch
from metacanvas_jax.parallel.rules import Rules, resolve
from metacanvas_jax.train.parameters import as_held, initial, param_shapes
from metacanvas_jax.trees import Rules as Partition
from metacanvas_jax.trees import flat, partition
from metacanvas_jax.types import Context, MllmInputs, Params

READ = ("tokens", "positions", "mask", "media", "text_tokens", "text_mask")

Enrich = Callable[[Params, Batch, Mesh, Rules], Batch]
"""``enrich(frozen, batch, mesh, rules)``: a batch on the host with contexts in place of what they are read from."""


def context_reader(experiment: Experiment) -> Enrich | None:
    """Puts contexts into batches, from the folder ``mllm.context_cache`` or from ``mllm.context_memory`` GiB of memory.

    None where the config has neither.

    Raises UserError when the networks that compute contexts train, or have no weights.
    """
    section, model = experiment.mllm, network(experiment)
    if not (section.context_cache or section.context_memory) or experiment.objective != "paint":
        return None
    name = "mllm.context_cache" if section.context_cache else "mllm.context_memory"
    sources = {part: source for part, source in weight_folders(experiment).items() if part in ("mllm", "text")}
    names = {part: source.sampled() for part, source in sources.items()}
    check_frozen(lambda key: initial(experiment, key), experiment.train.rules, names, name)
    networks = {part: source.config for part, source in sources.items()}
    made_by = identity(networks, names, experiment.train.frozen_dtype)
    writes = experiment.canvas is not None or experiment.queries is not None
    memory = int(section.context_memory * 2**30)
    cache = ContextCache(section.context_cache or None, made_by, keys_values=writes, memory=memory)

    def read(frozen: Params, inputs: MllmInputs) -> Context:
        return model.apply({"params": {name: frozen[name] for name in names}}, inputs, method="read")

    return stored_contexts(cache, mllm_inputs, read)


def with_context(experiment: Experiment, batch: Batch) -> Batch:
    """A batch as shapes, with the context in place of what it is read from: what ``context_reader`` makes of it."""
    model, held = network(experiment), as_held(experiment, param_shapes(experiment))
    part = {name: batch[name] for name in READ if name in batch}

    def read(params: Params, part: Batch) -> Context:
        variables = {"params": {name: tree for name, tree in params.items() if name != "vae"}}
        return samples_first(model.apply(variables, mllm_inputs(part), method="read"))

    rest = {name: value for name, value in batch.items() if name not in READ}
    return rest | {"context": jax.eval_shape(read, held, part)}


def samples_first(context: Context) -> Context:
    """Moves the samples of keys and values to the first axis, ``[b layers l g e]``; a second call moves them back."""
    return context.replace(cache=jax.tree.map(lambda x: x.swapaxes(0, 1), context.cache))


def stored_contexts(
    cache: ContextCache, inputs: Callable[[Batch], MllmInputs], read: Callable[[Params, MllmInputs], Context]
) -> Enrich:
    """Puts contexts into batches; only those that ``cache`` does not have are computed.

    ``inputs(batch)`` returns the MLLM's inputs, ``read(frozen, inputs)`` is the frozen network (traced). If one process
    misses a prompt of a batch, all processes compute the batch, because it is one program on the whole mesh. The host
    then waits for this program, behind the steps that are in flight. A batch whose contexts are all stored does not
    touch the devices: `metacanvas prepare` stores them ahead.
    """
    compiled: dict[Mesh, Callable] = {}

    def on(mesh: Mesh, rules: Rules) -> Callable:
        if mesh not in compiled:
            sharding = NamedSharding(mesh, resolve(("batch",), None, mesh, rules))
            compiled[mesh] = jax.jit(
                lambda frozen, part: samples_first(read(frozen, inputs(part))), out_shardings=sharding
            )
        return compiled[mesh]

    def enrich(frozen: Params, batch: Batch, mesh: Mesh, rules: Rules) -> Batch:
        part = {name: batch[name] for name in READ if name in batch}
        rest = {name: value for name, value in batch.items() if name not in READ}

        def encode(_: MllmInputs) -> Context:
            made = on(mesh, rules)(frozen, put_batch(part, mesh, rules))
            for leaf in jax.tree.leaves(made):
                leaf.copy_to_host_async()  # all of them, before the first is waited for
            return samples_first(jax.tree.map(local_rows, made))

        context = cache.read(inputs(part), encode, anyone=any_process)
        return rest | {"context": jax.tree.map(np.ascontiguousarray, samples_first(context))}

    return enrich


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true in any process; all processes must call this together."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def local_rows(x: jax.Array) -> np.ndarray:
    """This process's rows, in their order, of an array that is split along its first axis only."""
    if x.is_fully_addressable:
        return np.asarray(x)
    rows = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(rows[start]) for start in sorted(rows)])


def identity(configs: Mapping[str, Any], weights: Mapping[str, str], dtype: str) -> str:
    """A hash of the frozen networks that compute contexts: configs (dataclasses), hashes of weights, and their dtype.

    Adapters, remat and offload are left out, because they do not change a context.
    """

    def plain(tree: Any) -> Any:
        if isinstance(tree, Mapping):
            return {key: plain(value) for key, value in tree.items() if key not in ("lora", "remat", "offload")}
        return tree

    trees = {name: plain(dataclasses.asdict(config)) for name, config in configs.items()}
    text = json.dumps([trees, sorted(weights.values()), dtype], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_frozen(
    init: Callable[..., Params], rules: Partition, weights: Mapping[str, str], key: str = "mllm.context_cache"
) -> None:
    """Raises UserError, naming the config's ``key``, unless the networks that compute contexts have frozen weights."""
    if not weights:
        raise UserError(f"config: {key} needs mllm.weights, and a miniature has none: leave it out")
    trained = flat(partition(nn.meta.unbox(jax.eval_shape(init, jax.random.key(0))), rules)[0])
    reads = [path for path in trained if path.startswith(("mllm/", "text/")) and "_lora/" not in path]
    if reads:
        raise UserError(f"config: {key} keeps what never changes, but {reads[0]} trains")
