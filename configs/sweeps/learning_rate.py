"""Learning rates: over any config."""


def sweep(add):
    """Factors of three around the rate of the paper's text-to-image runs."""
    for rate in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3):
        add(f"lr_{rate:g}", **{"optimizer.learning_rate": rate})
