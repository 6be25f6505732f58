"""Text encoders of the published backbones."""
