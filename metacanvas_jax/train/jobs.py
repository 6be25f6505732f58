"""From an experiment to a training: what is initialised, loaded, frozen and minimised."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from metacanvas_jax import tasks
from metacanvas_jax.config import read
from metacanvas_jax.config.identity import identity
from metacanvas_jax.config.load import read_config
from metacanvas_jax.config.networks import autoencoder, network
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.weights import identities, weight_folders
from metacanvas_jax.data.inputs import batches
from metacanvas_jax.data.shapes import latent_grid, smallest_inputs
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.context_cache import ContextCache
from metacanvas_jax.tasks import GivenLatents
from metacanvas_jax.train import contexts, objectives, store, weights
from metacanvas_jax.train.job import FitConfig, Job
from metacanvas_jax.trees import flat, nested, partition
from metacanvas_jax.types import Context, MllmInputs, Params


def make_job(experiment: Experiment) -> Job:
    """The job of an experiment. Raises UserError when its data, tokenizer or frozen weights are not there."""
    model = network(experiment)
    frozen = {}
    if experiment.objective == "understand":
        prepare, loss = objectives.understanding(model, experiment.recall, experiment.recall_within)
    else:
        prepare, loss = objectives.painting(
            model,
            autoencoder(experiment),
            experiment.time,
            channels=experiment.given_channels,
            guidance=experiment.dit_guidance,
        )
        frozen = identities(experiment)
    return Job(
        init=lambda key: initial(experiment, key),
        prepare=prepare,
        loss=loss,
        rules=experiment.train.rules,
        batches=lambda: batches(experiment),
        optimizer=experiment.optimizer,
        config=identity(experiment),
        enrich=context_reader(experiment),
        load=lambda abstract: start_weights(experiment, abstract),
        frozen=frozen,
    )


def context_reader(experiment: Experiment) -> contexts.Enrich | None:
    """Batches with contexts from the folder ``mllm.context_cache``, None where the config names none.

    Raises UserError when the networks that contexts come from train, or have no weights.
    """
    section, model = experiment.mllm, network(experiment)
    if not section.context_cache or experiment.objective != "paint":
        return None
    sources = {part: source for part, source in weight_folders(experiment).items() if part in ("mllm", "text")}
    names = {part: source.identity() for part, source in sources.items()}
    contexts.check_frozen(lambda key: initial(experiment, key), experiment.train.rules, names)
    networks = {part: source.config for part, source in sources.items()}
    identity = contexts.identity(networks, names, experiment.train.frozen_dtype)
    writes = experiment.canvas is not None or experiment.queries is not None
    cache = ContextCache(section.context_cache, identity, keys_values=writes)

    def read(frozen: Params, inputs: MllmInputs) -> Context:
        return model.apply({"params": {name: frozen[name] for name in names}}, inputs, method="read")

    return contexts.stored_contexts(cache, objectives.mllm_inputs, read)


def fit_config(experiment: Experiment) -> FitConfig:
    """Length and rhythm of the training."""
    train = experiment.train
    return FitConfig(
        steps=train.steps,
        seed=experiment.seed,
        accumulate=train.accumulate,
        ema_decay=train.ema,
        frozen_dtype=train.frozen_dtype,
        log_every=train.log_every,
        preview_every=train.preview_every,
        evaluate_every=train.evaluate_every,
        checkpoint_every=train.checkpoint_every,
        keep_last=train.keep_last,
        keep_every=train.keep_every,
        keep_best=train.keep_best,
        max_skips=train.max_skips,
        stall_s=train.stall_s,
        mesh=experiment.mesh,
    )


def initial(experiment: Experiment, key: Key[Array, ""]) -> Params:
    """All parameters with their logical axes: the model's and, beside them under ``vae``, the autoencoder's."""
    model = network(experiment)
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


def start_weights(experiment: Experiment, abstract: Params) -> Params:
    """The parameters of ``abstract`` that are not random: what the run ``start`` trained, else what folders hold.

    ``abstract`` may be any part of the experiment's parameters; nothing else is read, and nothing twice.

    Raises UserError when something is not there, or that run has none of this one's parameters or one of another shape.
    """
    if not experiment.start:
        return weights.load(experiment, abstract)
    run, known = Path(experiment.start), flat(abstract)
    before = read.experiment(read_config(run))
    trained = flat(partition(shapes(before), before.train.rules)[0])
    here = trained.keys() & known.keys()
    for path in sorted(here):
        if trained[path].shape != known[path].shape:
            both = f"{trained[path].shape} there and {known[path].shape} here"
            raise UserError(f"{run}, the config's 'start': {path} has shape {both}")
    if not here and not trained.keys() & flat(shapes(experiment)).keys():
        raise UserError(f"{run} trained nothing that this run has; it is the config's 'start'")
    loaded = flat(weights.load(experiment, nested({path: x for path, x in known.items() if path not in here})))
    if here:
        wanted = nested({path: known.get(path, leaf) for path, leaf in trained.items()})
        with store.Store(run / "checkpoints", writable=False) as checkpoints:
            loaded |= flat(checkpoints.restore_params(wanted, ema=before.train.ema is not None, only=here))
    return nested(loaded)


def shapes(experiment: Experiment) -> Params:
    """All parameters as shapes."""
    return jax.eval_shape(lambda key: unboxed(initial(experiment, key)), jax.random.key(0))


def unboxed(params: Params) -> Params:
    """Parameters without their logical axes."""
    return nn.meta.unbox(params)


def chosen(weights: Params, wanted: Params, where: object) -> Params:
    """The leaves of ``weights`` that ``wanted`` has. Raises UserError for one that is missing."""
    have = flat(weights)
    if missing := [path for path in flat(wanted) if path not in have]:
        raise UserError(f"{where}: no weights for the frozen parameter {missing[0]} ({len(missing)} are missing)")
    return nested({path: have[path] for path in flat(wanted)})
