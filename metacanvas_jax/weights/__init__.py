"""Weights in files: tables of names, safetensors, published folders. Knows nothing of training."""
