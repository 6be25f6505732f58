"""Table 3: over configs/connector_ablation.py."""


def sweep(add):
    """One point per row of the table."""
    for variant in ("full", "no_time", "no_dit_block", "no_vanilla_block", "before_patchify", "text"):
        add(variant, variant)
