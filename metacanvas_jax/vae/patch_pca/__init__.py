"""A linear autoencoder of patches, for miniatures."""
