"""What a judge is asked about one result, and how its answers are read: VIEScore's protocol (Ku et al. 2024).

Semantic consistency is asked with all that was given, perceptual quality with the result alone. Each answer holds two
numbers from 0 to 10; the lower one counts. The words are this project's own, and scores of two versions of them cannot
be compared.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError

VERSION = "metacanvas-vie-1"
BEST = 10.0

Aspect = Literal["consistency", "quality"]
Frames = UInt8[np.ndarray, "t h w 3"]
Part = str | Frames

_FORM = (
    'Answer with one JSON object and nothing else: {"reason": "one short sentence", "scores": [first, second]}. '
    "Both scores are numbers from 0 to 10."
)
_EDITED = (
    "\nThe request was: {prompt}\nJudge how well the edit follows the request, not how pretty it is. First score: was "
    "what the request asks for done? 0 means that nothing of it was done, 10 that all of it was. Second score: was "
    "everything else left alone? 0 means that it could be {another}, 10 that only what had to change has changed. "
)
_QUALITY = (
    "\nJudge how this {medium} looks, whatever it was made for. First score: does it look natural? 0 means that the "
    "scene, its light, its shadows{moves} or its proportions are impossible, 10 that nothing looks wrong. Second "
    "score: is it free of damage? 0 means that blur, seams, noise, distorted bodies or unreadable parts cover it, 10 "
    "that there is none. "
)


@dataclasses.dataclass(frozen=True)
class Question:
    """Texts and media in their order. A picture is one frame; a video has ``fps`` frames a second."""

    aspect: Aspect
    parts: tuple[Part, ...]
    fps: float = 1.0


def questions(sample: Sample, result: Frames, fps: float) -> tuple[Question, Question]:
    """Both questions about one result. Raises UserError for a task that has no such judge."""
    video, words = len(result) > 1, sample.prompt
    medium = "video" if video else "picture"
    if sample.source is not None:
        asked = _EDITED.format(prompt=words, another="another video" if video else "another picture") + _FORM
        parts = (f"This is the original {medium}:", sample.source, f"\nThis is the edited {medium}:", result, asked)
    elif len(sample.references):
        given = [part for picture in sample.references for part in ("This is a reference:", picture[None])]
        asked = (
            f"\nThe request was: {words}\nJudge how well the {medium} follows the request and the references, not how "
            f"pretty it is. First score: does the {medium} show what the request tells? 0 means that nothing of it is "
            "there, 10 that all of it is. Second score: are what the references show and what is made the same people "
            "and things? 0 means that none of them can be recognised, 10 that each looks exactly the same. "
        )
        parts = (*given, f"\nThis is the {medium} that was made:", result, asked + _FORM)
    else:
        raise UserError(
            f"the judge compares edits and references with what was given; {sample.task} gives the result nothing"
        )
    quality = _QUALITY.format(medium=medium, moves=", its motions" if video else "") + _FORM
    return Question("consistency", parts, fps), Question("quality", (f"This is a {medium}:", result, quality), fps)


def read(answer: str) -> tuple[float, float] | None:
    """The two numbers of an answer; None where there are no such numbers: an answer is never guessed."""
    decoder, start = json.JSONDecoder(), answer.find("{")
    while start >= 0:
        try:
            found, _ = decoder.raw_decode(answer, start)
        except (ValueError, RecursionError):
            found = None
        if (scores := _scores(found)) is not None:
            return scores
        start = answer.find("{", start + 1)
    return None


def _scores(found: Any) -> tuple[float, float] | None:
    scores = found.get("scores") if isinstance(found, Mapping) else None
    if not isinstance(scores, list) or len(scores) != 2:
        return None
    if not all(type(score) in (int, float) and 0 <= score <= BEST for score in scores):
        return None
    return float(scores[0]), float(scores[1])
