"""Tables 8 and 10 and B.5: over configs/t2i_lora.py."""


def sweep(add):
    """Adapters in the DiT, without M-RoPE on the canvas, and with adapters in the MLLM."""
    for variant in ("dit_lora", "no_rope", "mllm_lora"):
        add(variant, variant)
