"""Canvas maps: the features that the canvas adds to the tokens, as colours (paper 3.4 and appendix I).

The three strongest principal components of the features become red, green and blue. The features are those of ``k``
latent frames, over which the keyframes of the canvas are stretched. Equal colours mean equal features. The hues have no
meaning.
"""

import math

import numpy as np
from jaxtyping import Float, UInt8

_TAILS = (1.0, 99.0)  # percentiles that become black and full colour, so that one outlier does not grey out the rest


def canvas_maps(features: Float[np.ndarray, "b k y x d"], *, shared: bool = False) -> UInt8[np.ndarray, "b k y x 3"]:
    """Colours of the features of each sample. The sign of every component is deterministic.

    Components are computed for each sample over all its frames, as in the paper. With ``shared`` they are computed
    for the whole batch, so that colours can be compared between pictures. Components that do not vary are mid-grey.
    Raises ValueError for features that are not finite.
    """
    if not np.isfinite(features).all():
        raise ValueError("canvas maps: the features are not finite")
    b, k, y, x, d = features.shape
    groups = features.reshape((1, -1, d) if shared else (b, -1, d)).astype(np.float64)
    return np.stack([_colours(rows) for rows in groups]).reshape(b, k, y, x, 3)


def keyframes(latents: int, count: int) -> list[int]:
    """The latent frames at which ``count`` keyframes stand: those in the middle of equal parts (``nn/resize.py``).

    A canvas has not more keyframes than there are latent frames (``sizes.py``).
    """
    count = min(count, latents)
    return [math.floor((k + 0.5) * latents / count) for k in range(count)]


def shown_at(latent: int, latents: int, frames: int) -> int:
    """The frame of a video that a latent frame belongs to: the first to the first, the last to the last."""
    return round(latent * (frames - 1) / max(1, latents - 1))


def laid_over(
    one: UInt8[np.ndarray, "y x 3"], picture: UInt8[np.ndarray, "h w 3"], share: float = 0.55
) -> UInt8[np.ndarray, "h w 3"]:
    """A map over its picture: the map's colours with weight ``share``, stretched to the picture's size."""
    height, width = picture.shape[:2]
    rows, columns = np.arange(height) * one.shape[0] // height, np.arange(width) * one.shape[1] // width
    stretched = one[rows][:, columns].astype(np.float64)
    return (share * stretched + (1 - share) * picture).round().astype(np.uint8)


def _colours(rows: Float[np.ndarray, "n d"]) -> UInt8[np.ndarray, "n 3"]:
    centred = rows - rows.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    directions, sizes = directions[:3], sizes[:3]
    strongest = np.argmax(np.abs(directions), axis=1)
    directions = directions * np.sign(directions[np.arange(len(directions)), strongest])[:, None]
    values = np.zeros((len(rows), 3))
    values[:, : len(directions)] = centred @ directions.T
    varies = np.zeros(3, bool)
    varies[: len(sizes)] = sizes > 1e-6 * max(np.abs(rows).max() * len(rows) ** 0.5, 1e-30)
    low, high = np.percentile(values, _TAILS, axis=0)
    scaled = (values - low) / np.where(varies & (high > low), high - low, 1.0)
    return np.where(varies & (high > low), 255 * np.clip(scaled, 0, 1), 127.5).round().astype(np.uint8)


def rows(
    pixels: UInt8[np.ndarray, "b t h w 3"], features: Float[np.ndarray, "b k y x d"], count: int
) -> list[UInt8[np.ndarray, "h W 3"]]:
    """One picture per result: of each of ``count`` keyframes, from left to right, its frame and its map."""
    made = []
    for video, maps in zip(pixels, canvas_maps(features), strict=True):
        pairs = [beside(video[shown_at(k, len(maps), len(video))], maps[k]) for k in keyframes(len(maps), count)]
        made.append(np.concatenate(pairs, axis=1))
    return made


def moving(
    pixels: UInt8[np.ndarray, "b t h w 3"], features: Float[np.ndarray, "b k y x d"]
) -> list[UInt8[np.ndarray, "t h W 3"]]:
    """One video per result: each frame, and to its right the map of the latent frame that it comes from."""
    made = []
    for video, maps in zip(pixels, canvas_maps(features), strict=True):
        starts = [shown_at(latent, len(maps), len(video)) for latent in range(len(maps))]
        latent = np.searchsorted(starts, range(len(video)))  # a latent frame ends with the frame that it is shown at
        made.append(np.stack([beside(frame, maps[place]) for frame, place in zip(video, latent, strict=True)]))
    return made


def beside(picture: UInt8[np.ndarray, "h w 3"], one: UInt8[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, "h W 3"]:
    """A picture, and to its right its map in the same size."""
    return np.concatenate([picture, _in_size(one, *picture.shape[:2])], axis=1)


def _in_size(picture: UInt8[np.ndarray, "y x 3"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """The nearest cell of each pixel."""
    down = np.arange(height) * picture.shape[0] // height
    return picture[down][:, np.arange(width) * picture.shape[1] // width]
