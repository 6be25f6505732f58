"""Input and output structs, and the one dimension glossary of the project.

Dimensions (the names used in every jaxtyping shape):

====  =====================================================================================
b     batch
l     context tokens of the MLLM (text and media, padded to a bucket)
n     tokens of a sequence in general; in a DiT, latent patch tokens
m     keys attended to (``m == n`` in self-attention)
k y x canvas keyframes, rows, columns
t h w frames, rows, columns (of a video, of latents, or of the grid of patch tokens)
c     channels
d     width of a hidden state
q     values of one vision patch (channels x temporal patch x rows x columns)
p     vision patches of one image or video; r is the number of merged tokens it becomes
g e   key/value heads, head width
====  =====================================================================================

Conventions: channels last; a video is ``[b t h w c]`` and an image is a video with ``t == 1``; pixels lie in [-1, 1];
the noise level lies in [0, 1] where 1 is pure noise; the velocity is noise minus data.
"""

from typing import Any

from flax import struct
from jaxtyping import Array, Bool, Float, Int

Params = dict[str, Any]
"""A nested dict of arrays, as Linen makes it."""

Grid = tuple[int, int, int]
"""(frames, rows, columns)."""


@struct.dataclass
class Media:
    """Images or videos of one grid, the same number of them in every sample of the batch.

    ``patches`` are normalised pixels, one row per patch, in the order in which the vision tower merges them.
    ``slots[b, i, j]`` is the place of merged token ``j`` of medium ``i`` in the sequence of sample ``b``; an index of
    ``l`` or more means that the sample has no such medium, and its features are dropped.
    """

    patches: Float[Array, "b i p q"]
    slots: Int[Array, "b i r"]
    grid: Grid = struct.field(pytree_node=False)  # in patches: (temporal grids, rows, columns)


@struct.dataclass
class Text:
    """Tokens for the text encoder that a DiT keeps for itself; padding stands on the right."""

    tokens: Int[Array, "b n"]
    mask: Bool[Array, "b n"]


@struct.dataclass
class MllmInputs:
    """What the MLLM reads, and the DiT's own text encoder where there is one.

    ``positions`` are explicit: (temporal, height, width) of every token.
    """

    tokens: Int[Array, "b l"]
    positions: Int[Array, "3 b l"]
    mask: Bool[Array, "b l"]  # True on real tokens; padding may stand left or right
    media: tuple[Media, ...] = ()
    text: Text | None = None


@struct.dataclass
class KeyValues:
    """Keys (rotated) and values of every layer for a prefix that is not computed again."""

    keys: Float[Array, "layers b l g e"]
    values: Float[Array, "layers b l g e"]


@struct.dataclass
class States:
    """Hidden states of a text and which of them belong to real tokens; ``mask`` None: all of them do."""

    states: Float[Array, "b l d"]
    mask: Bool[Array, "b l"] | None = None


@struct.dataclass
class Context:
    """What the frozen encoders made of a prompt: hidden states after the final norm, and what the canvas attends to.

    ``next_position`` is the first free position after the last real token; the canvas starts there. ``text`` are the
    states of the text encoder that the DiT keeps for itself, where there is one.
    """

    hidden: Float[Array, "b l d"]
    mask: Bool[Array, "b l"]
    cache: KeyValues | None  # None unless it was asked for
    next_position: Int[Array, " b"]
    text: States | None = None


@struct.dataclass
class Plan:
    """What MetaCanvas gives a DiT: the text states, and the canvas in the DiT's width (None without canvas).

    ``kept`` says which samples of a batch get their canvas (None: all of them).
    """

    text: States
    canvas: Float[Array, "b k y x d"] | None = None
    kept: Bool[Array, " b"] | None = None


@struct.dataclass
class Given:
    """What a task gives a DiT besides the plan. A DiT raises ValueError for a field that it cannot use.

    ``reference`` are clean latents of reference images or frames. ``channels`` are latents that are concatenated to the
    noisy ones along the channels. ``pooled`` is one vector of the whole text. ``guidance`` is the guidance scale, an
    input of a guidance-distilled DiT.
    """

    reference: tuple[Float[Array, "b t h w c"], ...] = ()
    channels: Float[Array, "b t h w c"] | None = None
    pooled: Float[Array, "b d"] | None = None
    guidance: Float[Array, " b"] | None = None


NOTHING = Given()


@struct.dataclass
class Tokens:
    """Patch tokens on their grid, between ``embed``, ``run`` and ``unembed`` of a DiT.

    The canvas connector reads ``grid`` and ``time`` and replaces ``grid``. It does not touch ``reference`` (tokens of
    reference images or frames) and ``private`` (what a DiT passes from one of its methods to the next).
    """

    grid: Float[Array, "b t h w d"]
    time: Float[Array, "b"] | Float[Array, "b t"]  # noise level in [0, 1], per sample or per frame
    reference: Float[Array, "b n d"] | None = None
    private: Any = None
