"""Evaluators: what scores a run."""
