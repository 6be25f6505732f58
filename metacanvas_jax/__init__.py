"""MetaCanvas in JAX/Flax: a frozen MLLM plans on canvas tokens, a diffusion transformer paints the plan."""

__version__ = "0.1.0"
