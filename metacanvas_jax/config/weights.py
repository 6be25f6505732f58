"""The folders of weights that an experiment names, by the part of the model that each is for."""

from pathlib import Path

from metacanvas_jax import files, registry
from metacanvas_jax.config.networks import mllm_config
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.weights import identity
from metacanvas_jax.weights.hashes import contents_hash
from metacanvas_jax.weights.sources import Source

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
"""The files that decide which tokens a text becomes."""


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
        part: Source(key, files.folder(folder), registry.of(config), config)
        for part, (key, folder, config) in named.items()
        if folder
    }


def identities(experiment: Experiment, *, whole: bool = False, there: bool = False) -> dict[str, str]:
    """Part of the model to what tells its weights from others (`weights/identity.py`); tokenizers are parts, too.

    ``whole`` reads weights whole; ``there`` leaves out folders that are not there.
    """
    sources = weight_folders(experiment)
    chosen = {part: source for part, source in sources.items() if not there or source.folder.exists()}
    found = {part: source.identity(whole=whole) for part, source in chosen.items()}
    for part, folder in _tokenizers(experiment).items():
        texts = [folder / name for name in TOKENIZER if (folder / name).is_file()]
        if texts:
            found[part] = identity.record(contents_hash(texts), "", "")
    return found


def folders(experiment: Experiment) -> dict[str, str]:
    """Part of the model to the folder of its weights, and of its tokenizer; "start" is the run that it starts from."""
    found = {part: source.folder for part, source in weight_folders(experiment).items()} | _tokenizers(experiment)
    return {part: str(folder) for part, folder in found.items()} | {"start": experiment.start}


def _tokenizers(experiment: Experiment) -> dict[str, Path]:
    named = {"mllm.tokenizer": experiment.mllm.tokenizer}
    if experiment.text is not None:
        named["text.tokenizer"] = experiment.text.tokenizer
    return {part: files.folder(folder) for part, folder in named.items() if folder}
