"""Fig. 4: over configs/t2i_scratch.py."""


def sweep(add):
    """The five ways in which a prompt can reach the DiT."""
    for variant in ("canvas", "canvas_only", "text", "metaquery", "text_metaquery"):
        add(variant, variant)
