"""The demo in miniature."""
