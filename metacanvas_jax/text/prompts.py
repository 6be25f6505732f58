"""Prompts of a text encoder that is a language model: an instruction and the prompt, and which states the DiT reads.

Source: arXiv 2410.10629 ("complex human instruction").
"""

from collections.abc import Callable, Sequence

import numpy as np

from metacanvas_jax.types import States

INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for"
        " image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial"
        " relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without"
        " overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping"
        " peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing"
        " street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering"
        " glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional"
        " commentary or evaluations:",
        "User Prompt: ",
    )
)
"""The instruction that the published networks of that paper were trained with."""


def prompt_tokens(
    tokenize: Callable[[str], Sequence[int]],
    prompts: Sequence[str],
    *,
    instruction: str = INSTRUCTION,
    length: int = 300,
    pad: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask ``[b n]`` of prompts (host side): instruction and prompt, lower case, cut or padded on the right.

    ``tokenize`` puts the beginning-of-sequence token first. With an instruction the sequence is ``length - 2`` longer
    than the instruction, so that ``first_and_last`` keeps ``length`` states; the unconditional prompt has none
    (``instruction=""``).
    """
    total = len(tokenize(instruction)) + length - 2 if instruction else length
    ids = np.full((len(prompts), total), pad, np.int32)
    mask = np.zeros((len(prompts), total), bool)
    for row, prompt in enumerate(prompts):
        tokens = tokenize(instruction + prompt.lower().strip())[:total]
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return ids, mask


def first_and_last(text: States, length: int) -> States:
    """The first state and the last ``length - 1``: without the instruction between them."""
    total = text.states.shape[1]
    keep = np.concatenate([[0], np.arange(total - length + 1, total)])
    return States(text.states[:, keep], text.mask[:, keep])
