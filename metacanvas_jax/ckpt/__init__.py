"""Checkpoints: Orbax store and exchange with safetensors."""
