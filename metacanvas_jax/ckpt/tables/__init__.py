"""Weight tables: published names to parameter paths."""
