"""A judge behind an OpenAI-compatible server, such as one of vLLM, SGLang, Ollama or llama.cpp on this machine."""

import base64
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from metacanvas_jax.data.decoding import encode_png
from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.evaluate.judging.questions import Question
from metacanvas_jax.retries import retried

FRAMES = 8  # of a video, which is sent as pictures: few servers read videos
MOST = 256  # tokens of an answer
TOGETHER = 8  # questions that a server is asked at the same time
WAIT_S = 600.0
TOO_MANY, INTERNAL = 429, 500  # answers of a server that is busy: this one, and those from the second on


class ServerJudge:
    """Asks ``URL/chat/completions``, or ``URL/v1/chat/completions`` where the URL has no path.

    ``model`` None is the only one that the server lists. A server that is busy for a moment is asked again
    (``retries.py``). Raises UserError for a server that is not there, or lists several models.
    """

    def __init__(self, url: str, model: str | None = None):
        base = url.rstrip("/")
        self.url = base if base.partition("://")[2].count("/") else f"{base}/v1"
        self.model = self._only() if model is None else model

    @property
    def name(self) -> str:
        """The model and its server."""
        return f"{self.model} at {self.url}"

    def answers(self, asked: Sequence[Question]) -> list[str]:
        """The raw answers, decoded greedily.

        Raises UserError for what is no answer, and Unreachable for a server that stays busy or is gone.
        """
        with ThreadPoolExecutor(TOGETHER) as pool:
            return list(pool.map(self._answer, asked))

    def _answer(self, question: Question) -> str:
        content = [entry for part in question.parts for entry in _content(part)]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": MOST,
        }
        data, place = json.dumps(body).encode(), "chat/completions"
        found = retried(lambda: self._call(place, data), f"{self.url}/{place}")
        try:
            text = found["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.url}: no answer in {json.dumps(found)[:200]}") from error
        return text if isinstance(text, str) else ""

    def _only(self) -> str:
        try:
            rows = self._call("models").get("data", [])
        except ConnectionError as error:
            raise UserError(f"{self.url}/models: no answer of a server ({first_line(error)})") from error
        names = [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]
        if len(names) != 1:
            raise UserError(f"{self.url} has the models {', '.join(names) or 'none'}: name one with --judge-model")
        return names[0]

    def _call(self, path: str, data: bytes | None = None) -> dict[str, Any]:
        """The server's JSON. Raises ConnectionError for what may pass by itself, and UserError for all else."""
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
                found = json.load(reply)
        except urllib.error.HTTPError as error:
            said = first_line(ValueError(error.read(400).decode(errors="replace").strip() or error.reason))
            if error.code == TOO_MANY or error.code >= INTERNAL:
                raise ConnectionError(f"the server answers {error.code}, {said}") from error
            raise UserError(f"{self.url}/{path}: the server answers {error.code}, {said}") from error
        except http.client.HTTPException as error:
            raise ConnectionError(f"the server broke off its answer ({first_line(error)})") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ConnectionError):
                raise reason from error
            raise UserError(f"{self.url}/{path}: no answer of a server ({first_line(error)})") from error
        if not isinstance(found, dict):
            raise UserError(f"{self.url}/{path}: expected a JSON object, found {type(found).__name__}")
        return found


def _content(part: Any) -> list[dict[str, Any]]:
    """A part of a question as the server takes it."""
    if isinstance(part, str):
        return [{"type": "text", "text": part}]
    chosen = np.unique(np.linspace(0, len(part) - 1, FRAMES).round().astype(int))
    pictures = [base64.b64encode(encode_png(part[place])).decode("ascii") for place in chosen]
    return [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}} for data in pictures]
