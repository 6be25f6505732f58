"""Runs to folders for PyTorch and back."""
