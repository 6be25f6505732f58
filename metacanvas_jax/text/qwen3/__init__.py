"""Qwen3 as a text encoder."""
