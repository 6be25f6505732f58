"""How canvas tokens are numbered and what they see: over configs/t2i_lora.py or configs/t2i_scratch.py."""


def sweep(add):
    """M-RoPE as an image, as one row, like text; causal or seeing each other."""
    add("image")
    add("row", **{"canvas.dims": 1})
    add("like_text", **{"canvas.rope": False})
    add("bidirectional", **{"canvas.bidirectional": True})
