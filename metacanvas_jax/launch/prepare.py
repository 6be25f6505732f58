"""Writes what a config needs before it trains, as far as this machine can make it."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from metacanvas_jax import files, registry
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import DRAWN, EMOJI
from metacanvas_jax.data import by_size
from metacanvas_jax.data.formats import records
from metacanvas_jax.data.inputs import sources_of
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.tokenizer import fitted_tokenizer, save_tokenizer, train_tokenizer
from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.distributed import barrier, chief
from metacanvas_jax.weights import saved
from metacanvas_jax.worlds.questions import sample_texts

FITTED = 2000  # samples that an autoencoder and a tokenizer are fitted to, at most


def prepare(setup: Experiment) -> list[Path]:
    """Writes what the config names and is not there yet: scenes, tokenizer, autoencoder. Returns their places."""
    places = []
    if not setup.sources:
        places.append(records.prepare(setup.data.path, setup.world, setup.data.count, setup.seed))
        if setup.data.picture_weight:
            places.append(records.prepare_pictures(setup.data.pictures_path, setup.world.size))
    samples = functools.cache(lambda: _samples(setup))  # read once, so that a bad one is named once
    tokenizer = files.folder(setup.mllm.tokenizer)
    if not tokenizer.exists():
        save_tokenizer(_tokenizer(setup, samples), tokenizer)
    places.append(tokenizer)
    fit = None if setup.vae is None else registry.of(setup.vae).fit
    if fit is not None and setup.vae_weights:
        folder = files.folder(setup.vae_weights)
        if not (folder / "params.json").exists():
            try:
                params, psnr = fit(np.stack([sample.image for sample in samples()]), setup.vae)
            except ValueError as error:
                raise UserError(f"the autoencoder {setup.vae_weights}: {error}") from error
            saved.save(folder, params, {"psnr": psnr})
        places.append(folder)
    return places


def make_missing(setup: Experiment) -> None:
    """Before a training: makes what a miniature with sources needs, in seconds. All processes call it together.

    Raises UserError where the autoencoder of any other config is still to be made.
    """
    fit = None if setup.vae is None else registry.of(setup.vae).fit
    drawn = all(source.kind in EMOJI or not source.path for source in setup.sources)
    fresh = not setup.mllm.weights or files.folder(setup.mllm.tokenizer).exists()  # no tokenizer is made for weights
    if setup.sources and (drawn or (fit is not None and fresh)):
        try:
            if chief():
                prepare(setup)
        finally:
            barrier("prepare", timeout_s=1800)
        prepare(setup)  # where hosts share no disk, each of them
    elif fit is not None and setup.vae_weights and not files.folder(setup.vae_weights).exists():
        raise UserError(f"{setup.vae_weights}: no such folder yet; `metacanvas prepare --config ...` makes it")


def _tokenizer(setup: Experiment, samples: Callable[[], list[Sample]]) -> PreTrainedTokenizerFast:
    """A tokenizer of the words of the world; of the captions, where the samples are not drawn."""
    if all(source.kind in DRAWN | EMOJI for source in setup.sources):
        return train_tokenizer(sample_texts(setup.world))
    sizes = [setup.mllm.language.vocab] + ([] if setup.text is None else [setup.text.encoder.vocab])
    return fitted_tokenizer([sample.prompt for sample in samples()], min(sizes))


def _samples(setup: Experiment) -> list[Sample]:
    """The first samples of the training, in the shape of the first bucket that is looked at."""
    records = sources_of(setup, by_size.looked_at(setup)[0])[0].records
    return [records[i] for i in range(min(FITTED, len(records)))]
