"""Sources, tasks and the Grain pipeline."""
