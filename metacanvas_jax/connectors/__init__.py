"""Between the MLLM and the diffusion transformer."""
