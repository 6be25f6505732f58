"""FLUX's autoencoder."""
