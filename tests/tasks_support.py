"""Stand-ins that make what a task does visible: an autoencoder of means, and a model that keeps its inputs."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.tokenizer import train_tokenizer
from metacanvas_jax.mllm.media import MediaConfig
from metacanvas_jax.mllm.prompt import PromptConfig, Prompter
from metacanvas_jax.tasks import TASKS, Bucket
from metacanvas_jax.types import Plan, States

SIZE, FRAMES, FPS = (32, 64), 9, 8.0
VOCABULARY = ["make the cat red", "a cat and a dog", "Show this picture again, exactly as it is."]


class Pick(nn.Module):
    """Every fourth frame, averaged over 8 x 8 pixels: the factors of a causal video autoencoder."""

    spatial, temporal, channels = 8, 4, 3

    def encode(self, video):
        b, t, h, w, c = video[:, ::4].shape
        return video[:, ::4].reshape(b, t, h // 8, 8, w // 8, 8, c).mean(axis=(3, 5))


class Spy:
    """Has the interface of MetaCanvas that training uses; predicts a constant velocity."""

    canvas = None

    def __init__(self, velocity: float = 0.0):
        self.velocity, self.seen = velocity, {}

    def apply(self, variables: Any, *inputs: Any, method: str, **options: Any) -> Any:
        if method == "read":
            return inputs[0]
        if method == "plan":
            samples = inputs[0].tokens.shape[0]
            return Plan(States(jnp.zeros((samples, 1, 4)), jnp.ones((samples, 1), bool)))
        latents, time, _, given = inputs
        self.seen = {"latents": latents, "time": time, "given": given}
        return jnp.full_like(latents, self.velocity)


def prompter() -> Prompter:
    """Qwen's patches and a budget of 144 tokens per image, with a small vocabulary."""
    return Prompter(train_tokenizer(VOCABULARY), PromptConfig(system=None, media=MediaConfig(tokens=144)))


def bucket(task: str, length: int = 512) -> Bucket:
    frames = FRAMES if TASKS[task].makes == "video" else 1
    return Bucket(task, SIZE, frames, FPS, length, batch=2, references=2 if task == "reference_to_video" else 0)


def sample(task: str, seed: int = 0) -> Sample:
    """Random media of every kind that any task could read."""
    rng = np.random.default_rng(seed)

    def video(frames: int) -> np.ndarray:
        return rng.integers(0, 256, (frames, *SIZE, 3), np.uint8)

    frames = FRAMES if TASKS[task].makes == "video" else 1
    references = (video(1)[0], video(1)[0], video(1)[0])
    return Sample("make the cat red", video(frames), task, video(frames), references, FPS)
