"""Writes what a config needs before it trains, as far as this machine can make it."""

from pathlib import Path

import numpy as np

from metacanvas_jax import files, registry
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.formats import records
from metacanvas_jax.data.inputs import sources_of
from metacanvas_jax.data.tokenizer import save_tokenizer, train_tokenizer
from metacanvas_jax.weights import saved
from metacanvas_jax.worlds.questions import sample_texts

FITTED = 2000  # pictures that an autoencoder is fitted to, at most


def prepare(setup: Experiment) -> list[Path]:
    """Writes what the config names and is not there yet: scenes, tokenizer, autoencoder. Returns their places."""
    places = []
    if not setup.sources:
        places.append(records.prepare(setup.data.path, setup.world, setup.data.count, setup.seed))
        if setup.data.picture_weight:
            places.append(records.prepare_pictures(setup.data.pictures_path, setup.world.size))
    tokenizer = files.folder(setup.mllm.tokenizer)
    if not tokenizer.exists():
        save_tokenizer(train_tokenizer(sample_texts(setup.world)), tokenizer)
    places.append(tokenizer)
    fit = None if setup.vae is None else registry.of(setup.vae).fit
    if fit is not None and setup.vae_weights:
        folder = files.folder(setup.vae_weights)
        if not (folder / "params.json").exists():
            samples = sources_of(setup, setup.shapes[0])[0].records
            images = np.stack([samples[i].image for i in range(min(FITTED, len(samples)))])
            params, psnr = fit(images, setup.vae)
            saved.save(folder, params, {"psnr": psnr})
        places.append(folder)
    return places
