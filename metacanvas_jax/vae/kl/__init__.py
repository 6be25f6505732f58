"""The image autoencoder with a KL-regularised posterior."""
