"""One sample of any task: what is to be made, from which words, pictures and videos."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

LATENTS = {"pixels": "latents", "source": "source_latents", "references": "reference_latents"}
"""What the autoencoder reads of a batch, and what it is called in ``arrays`` and in batches once it is encoded."""

SOURCE_FRAMES = "source_frames"
"""In ``arrays``: the frames [n] of its clip that a source has, where its latents replace the others."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample; a picture is a video of one frame, and all pixels are sRGB.

    ``prompt`` is the caption or the instruction. ``source`` is what an editing task starts from, ``references`` are the
    pictures a video is to show. ``fps`` are the frames per second of target and source (None: a picture). ``name`` says
    where the sample came from. ``metadata`` (GenEval's, of the prompt) and ``scene`` (the whole ground truth) are JSON,
    empty where there is none. ``arrays`` holds what was computed ahead, such as ``latents``.
    """

    prompt: str
    target: UInt8[np.ndarray, "t h w 3"]
    task: str = "text_to_image"
    source: UInt8[np.ndarray, "t h w 3"] | None = None
    references: tuple[UInt8[np.ndarray, "h w 3"], ...] = ()
    fps: float | None = None
    name: str = ""
    metadata: str = ""
    scene: str = ""
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def image(self) -> UInt8[np.ndarray, "h w 3"]:
        """The first frame of the target."""
        return self.target[0]
