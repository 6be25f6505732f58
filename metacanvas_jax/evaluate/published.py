"""The backbone of a run as it was published: the "before" of the paper's tables."""

import dataclasses

from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.errors import UserError


def published(setup: Experiment) -> Experiment:
    """The same experiment without MetaCanvas: the DiT of ``dit_weights`` reads its own text encoder alone.

    Raises UserError for a run whose DiT starts from scratch, or whose text encoder the MLLM replaced.
    """
    if setup.text is None:
        raise UserError(
            "--base needs the text encoder that the backbone was published with, which the MLLM replaces in this run: "
            "draw the base with its own pipeline"
        )
    if not setup.dit_weights:
        raise UserError("--base needs published weights of the DiT; this run trains it from scratch")
    dit = dataclasses.replace(setup.dit, lora=None) if getattr(setup.dit, "lora", None) is not None else setup.dit
    language = setup.mllm.language
    if getattr(language, "lora", None) is not None:
        language = dataclasses.replace(language, lora=None)
    return dataclasses.replace(
        setup,
        dit=dit,
        mllm=dataclasses.replace(setup.mllm, language=language),
        text=dataclasses.replace(setup.text, reads_prompt=True),
        start="",
        canvas=None,
        canvas_connector=None,
        context_connector=None,
        queries=None,
    )
