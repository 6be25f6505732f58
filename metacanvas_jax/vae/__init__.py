"""Autoencoders behind one contract (``vae/base.py``)."""
