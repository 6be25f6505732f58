"""Diffusion transformers behind one contract (``dit/base.py``)."""
