"""Scores and pictures of what was learned."""
