"""Qwen2.5-VL: prompts, positions, vision tower, language model, canvas tokens."""
