"""Attention and linear attention behind one entry point each."""
