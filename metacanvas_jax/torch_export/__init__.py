"""What was trained here, run in PyTorch on the models of transformers and diffusers; nothing in it imports jax.

The package is also an implementation of MetaCanvas of its own: the tests hold the two against each other.
"""

from metacanvas_jax.torch_export.pipeline import MetaCanvasPipeline

__all__ = ["MetaCanvasPipeline"]
