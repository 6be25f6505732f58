"""Exact worlds of OpenMoji drawings: requests, scenes, questions about them, edits, animations, and their judge."""
