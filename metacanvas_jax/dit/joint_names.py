"""How diffusers names the joint attention of two streams, in every network that has it (``models/attention.py``)."""

IMAGE = {
    "q": "attn.to_q",
    "k": "attn.to_k",
    "v": "attn.to_v",
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
    "out": "attn.to_out.0",
}
TEXT = {
    "q": "attn.add_q_proj",
    "k": "attn.add_k_proj",
    "v": "attn.add_v_proj",
    "q_norm": "attn.norm_added_q",
    "k_norm": "attn.norm_added_k",
    "out": "attn.to_add_out",
}
