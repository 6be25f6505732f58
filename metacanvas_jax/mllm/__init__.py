"""Multimodal language models: their contract, positions, canvas tokens, stored contexts, and one folder for each."""
