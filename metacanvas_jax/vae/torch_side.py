"""Autoencoders in PyTorch: pixels ``[b 3 t h w]`` in [-1, 1] to normalised latents ``[b c t h w]``, and back.

The torch side of each is the class ``Side`` of ``torch_side.py`` in its folder. It is made from a model of diffusers
(``model``), or, where ``model`` is None, by ``from_pretrained`` from the folder that an export writes.
"""

from collections.abc import Callable

from torch import Tensor


def per_frame(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A network of images on every frame of a video."""
    frames = network(x.movedim(2, 1).flatten(0, 1))
    return frames.unflatten(0, (len(x), -1)).movedim(1, 2)
