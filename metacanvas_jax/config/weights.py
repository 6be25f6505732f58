"""The folders of weights that an experiment names, by the part of the model that each is for."""

from pathlib import Path

from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig
from metacanvas_jax.weights.sources import Source


def weight_folders(experiment: Experiment) -> dict[str, Source]:
    """The folders of an experiment by the part of the model they are for; parts without one start at random.

    An MLLM that is taught by itself (objective "understand") starts at random as well.
    """
    if experiment.objective != "paint":
        return {}
    mllm = MllmConfig(experiment.mllm.language, experiment.mllm.vision)
    named = {
        "mllm": ("mllm.weights", experiment.mllm.weights, mllm, "text_encoder"),
        "dit": ("dit_weights", experiment.dit_weights, experiment.dit, "transformer"),
        "vae": ("vae_weights", experiment.vae_weights, experiment.vae, "vae"),
    }
    if experiment.text is not None:
        named["text"] = ("text.weights", experiment.text.weights, experiment.text.encoder, "text_encoder")
    return {
        part: Source(key, Path(folder), config, subfolder)
        for part, (key, folder, config, subfolder) in named.items()
        if folder
    }


def identities(experiment: Experiment) -> dict[str, str]:
    """Folder of frozen weights to what tells them from others; for the description of a checkpoint."""
    return {str(source.folder): source.identity() for source in weight_folders(experiment).values()}
