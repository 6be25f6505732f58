"""SANA's autoencoder, DC-AE."""
