"""Rectified flow: path, loss, samplers, guidance. The network is always an argument."""
