"""The folders of weights that an experiment names, by the part of the model that each is for."""

from pathlib import Path

from metacanvas_jax import registry
from metacanvas_jax.config.networks import mllm_config
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.weights.sources import Source


def weight_folders(experiment: Experiment) -> dict[str, Source]:
    """The folders of an experiment by the part of the model they are for; parts without one start at random.

    An MLLM that is taught by itself (objective "understand") starts at random as well.
    """
    if experiment.objective != "paint":
        return {}
    named = {
        "mllm": ("mllm.weights", experiment.mllm.weights, mllm_config(experiment)),
        "dit": ("dit_weights", experiment.dit_weights, experiment.dit),
        "vae": ("vae_weights", experiment.vae_weights, experiment.vae),
    }
    if experiment.text is not None:
        named["text"] = ("text.weights", experiment.text.weights, experiment.text.encoder)
    return {
        part: Source(key, Path(folder), registry.of(config), config)
        for part, (key, folder, config) in named.items()
        if folder
    }


def identities(experiment: Experiment) -> dict[str, str]:
    """Folder of frozen weights to what tells them from others; for the description of a checkpoint."""
    return {str(source.folder): source.identity() for source in weight_folders(experiment).values()}
