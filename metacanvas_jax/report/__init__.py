"""Charts, contact sheets and pages."""
