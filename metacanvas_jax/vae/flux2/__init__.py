"""The image autoencoder of FLUX.2."""
