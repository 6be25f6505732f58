"""The table of the tasks, apart from what turns a row into inputs: the command line reads it before JAX is imported."""

import dataclasses
from typing import Literal

Medium = Literal["nothing", "source", "references", "first frame", "target"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of the table.

    ``makes`` is what is painted. ``mllm`` is the medium before the prompt in the MLLM's input. ``vae`` is the medium
    that the autoencoder encodes for the DiT, besides the target. ``first_frame`` "clean" means that the first latent
    frame is that of the given image, at noise level 0 and without loss.
    """

    makes: Literal["image", "video"]
    mllm: Medium
    vae: Medium
    first_frame: Literal["noisy", "clean"]


TASKS: dict[str, Task] = {
    #                           makes     MLLM sees      DiT is given   first frame
    "text_to_image":       Task("image", "nothing",     "nothing",     "noisy"),
    "reconstruction":      Task("image", "target",      "nothing",     "noisy"),
    "image_editing":       Task("image", "source",      "source",      "noisy"),
    "text_to_video":       Task("video", "nothing",     "nothing",     "noisy"),
    "image_to_video":      Task("video", "first frame", "first frame", "clean"),
    "video_editing":       Task("video", "source",      "source",      "noisy"),
    "reference_to_video":  Task("video", "references",  "references",  "noisy"),
}  # fmt: skip
