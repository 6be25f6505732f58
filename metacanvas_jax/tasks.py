"""The tasks: what each of them gives to the MLLM, to the autoencoder and to the diffusion transformer.

``TASKS`` (task_table.py) holds every difference between tasks. The functions below turn a row of it into network
inputs, the same in training and in sampling. How given latents enter a DiT depends on the DiT (paper, Fig. 3):

- *input channels*: given latents are concatenated to the noisy latents of the same frame along the channels, with one
  more channel that is 1 where something is given. The source of an edit fills all frames, the first frame of
  image-to-video fills that frame, and references fill frames of their own;
- *reference tokens*: references are additional frames or images that are clean (noise level 0) and get no canvas and no
  loss. Without input channels, the source of an edit is one of them.
"""

import dataclasses
from collections.abc import Iterable

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from metacanvas_jax.task_table import TASKS, Task
from metacanvas_jax.types import Given

RECONSTRUCT = "Show this picture again, exactly as it is."
"""The prompt of a reconstruction, in place of its caption."""


@dataclasses.dataclass(frozen=True, order=True)
class SortKey:
    """What samples are sorted by: the size (rows, columns) and the ``length`` of their prompts (0: prompts of any)."""

    size: tuple[int, int]
    length: int = 0

    @property
    def name(self) -> str:
        """The name of its folder: ``512x512``, or ``512x512-128``."""
        return f"{self.size[0]}x{self.size[1]}" + (f"-{self.length}" if self.length else "")

    @property
    def words(self) -> str:
        """The same in a message."""
        return f"{self.size[0]} x {self.size[1]} pixels" + (f" and {self.length} tokens" if self.length else "")

    def holds(self, other: "SortKey") -> bool:
        """Whether a bucket of this key reads samples of the other: without a length it reads all of its size."""
        return self.size == other.size and self.length in (0, other.length)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Batches of one static shape and one task; a training step draws one bucket, with probability by ``weight``.

    ``size`` are the rows and columns in pixels of the target, its source and its references; ``frames`` are its frames
    at ``fps`` per second. Prompts, media included, are padded to ``length`` tokens. ``batch`` is the number of samples
    of a step over all devices (None: ``train.batch``). ``references`` is the number of reference images of a sample; a
    sample with fewer repeats them. With ``by_length`` other buckets have the same task and size and another length, and
    a sorted source gives to each the prompts that fit into no shorter one (``data/by_size.py``).

    Raises ValueError for an unknown task, or shapes that it cannot have.
    """

    task: str
    size: tuple[int, int]
    frames: int = 1
    fps: float = 24.0
    length: int = 256
    batch: int | None = None
    weight: float = 1.0
    references: int = 0
    by_length: bool = False

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}, expected one of {', '.join(TASKS)}")
        if (TASKS[self.task].makes == "video") != (self.frames > 1):
            raise ValueError(f"{self.task} makes one {TASKS[self.task].makes}, which {self.frames} frames are not")
        if (TASKS[self.task].vae == "references") != (self.references > 0):
            raise ValueError(f"{self.task} has {self.references} references")
        if min(*self.size, self.frames, self.length) < 1 or self.fps <= 0 or self.weight < 0:
            raise ValueError(f"sizes, frames, fps and length must be positive and the weight not negative: {self}")

    @property
    def name(self) -> str:
        """Task and shape: ``text_to_video 121x704x1280``; with ``by_length`` also ``..., 128 tokens``."""
        shape = f"{self.task} {self.frames}x{self.size[0]}x{self.size[1]}"
        return f"{shape}, {self.length} tokens" if self.by_length else shape

    @property
    def key(self) -> SortKey:
        """Which samples of a sorted source it reads."""
        return SortKey(self.size, self.length if self.by_length else 0)


def overlapping(buckets: Iterable[Bucket]) -> Bucket | None:
    """The first of the buckets of one task that would read samples of another before it from a sorted source."""
    before: list[SortKey] = []
    for bucket in buckets:
        if any(bucket.key.holds(key) or key.holds(bucket.key) for key in before):
            return bucket
        before.append(bucket.key)
    return None


def any_length(buckets: Iterable[Bucket]) -> tuple[Bucket, ...]:
    """Buckets for prompts of any length: those that differ in length alone become one, the longest of them.

    It has the place of the first, the sum of the weights, and reads the samples of all of them.
    """
    groups: dict[Bucket | int, list[Bucket]] = {}
    for number, bucket in enumerate(buckets):
        alike = dataclasses.replace(bucket, length=1, batch=None, weight=1.0) if bucket.by_length else number
        groups.setdefault(alike, []).append(bucket)
    return tuple(group[0] if not group[0].by_length else _longest(group) for group in groups.values())


def _longest(group: list[Bucket]) -> Bucket:
    longest = max(group, key=lambda bucket: bucket.length)
    return dataclasses.replace(longest, by_length=False, weight=sum(bucket.weight for bucket in group))


@struct.dataclass
class TaskName:
    """The task of a batch: part of its structure, not of its data, so that each task is compiled for itself."""

    name: str = struct.field(pytree_node=False, default="text_to_image")


@struct.dataclass
class GivenLatents:
    """Clean latents that a task gives to the DiT beside the prompt."""

    source: Float[Array, "b t h w c"] | None = None
    first: Float[Array, "b 1 h w c"] | None = None
    references: Float[Array, "b r h w c"] | None = None


def for_dit(
    given: GivenLatents, latents: Float[Array, "b t h w c"], *, channels: bool, guidance: float | None = None
) -> Given:
    """Given latents, and a guidance scale, in the form that ``MetaCanvas.velocity`` takes.

    ``latents`` are the noisy ones, of which only shape and dtype count. ``channels`` says that the DiT has input
    channels for given latents. ``guidance`` is the guidance scale that a guidance-distilled DiT reads.
    """
    reference = (
        () if given.references is None else tuple(jnp.split(given.references, given.references.shape[1], axis=1))
    )
    extra = None
    if channels:
        extra = given_channels(given, latents)
    elif given.source is not None:
        reference = (given.source, *reference)
    scale = None if guidance is None else jnp.full(latents.shape[:1], guidance, jnp.float32)
    return Given(reference=reference, channels=extra, guidance=scale)


def given_channels(given: GivenLatents, latents: Float[Array, "b t h w c"]) -> Float[Array, "b r+t h w c+1"]:
    """Given latents on their frames and zeros on the others, with a last channel that is 1 where they are given."""
    if given.source is not None:
        frames = marked(given.source, 1.0)
    else:
        frames = marked(jnp.zeros_like(latents), 0.0)
        if given.first is not None:
            first = marked(given.first.astype(latents.dtype), 1.0)
            frames = jnp.concatenate([first, frames[:, 1:]], axis=1)
    if given.references is None:
        return frames
    return jnp.concatenate([marked(given.references.astype(frames.dtype), 1.0), frames], axis=1)


def marked(latents: Float[Array, "b t h w c"], mark: float) -> Float[Array, "b t h w c+1"]:
    """Latents with one more channel of a constant."""
    return jnp.pad(latents, ((0, 0),) * 4 + ((0, 1),), constant_values=((0, 0),) * 4 + ((0, mark),))


def frame_levels(task: Task, time: Float[Array, " b"], frames: int) -> Float[Array, "b"] | Float[Array, "b t"]:
    """Noise levels of a task: one per sample, or one per frame where the first frame is clean."""
    return time if task.first_frame == "noisy" else clean_first_levels(time, frames)


def clean_first_levels(time: Float[Array, " b"], frames: int) -> Float[Array, "b t"]:
    """One noise level per frame: 0 for the first frame, ``time`` for the others."""
    return jnp.where(jnp.arange(frames)[None] > 0, time[:, None], jnp.zeros_like(time)[:, None])


def replace_first_frame(
    latents: Float[Array, "b t h w c"], image: Float[Array, "b 1 h w c"]
) -> Float[Array, "b t h w c"]:
    """The latents with the clean latent of an image as their first frame."""
    return jnp.concatenate([image.astype(latents.dtype), latents[:, 1:]], axis=1)


def loss_mask(task: Task, batch: int, frames: int) -> Bool[Array, "b t 1 1"] | None:
    """True on the latent frames that count in the loss; None if all do."""
    if task.first_frame == "noisy":
        return None
    return jnp.broadcast_to(jnp.arange(frames) > 0, (batch, frames))[:, :, None, None]
