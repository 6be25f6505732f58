"""DC-AE, a deep compression autoencoder of images."""
