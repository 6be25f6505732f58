"""Partition, optimizer, step and loop."""
