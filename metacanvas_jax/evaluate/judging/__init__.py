"""Judges of results: a VLM that is asked, and how its answers become scores."""
