"""Wan2.2's causal video autoencoder."""
