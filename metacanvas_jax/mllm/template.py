"""The chat template: the special tokens of a prompt and the words between them, for JAX, exports and PyTorch alike.

A prompt is ``system`` (left out where there is no system prompt), then the turn of the user:
``<start>system\\nTEXT<end>\\n<start>user\\nMEDIA TEXT<end>``. Each medium is a run of placeholders between two tokens.
An MLLM with timestamps reads each temporal patch of a video as a run of its own, after its time in words.
"""

CHAT = {
    "start": "<|im_start|>",
    "end": "<|im_end|>",
    "between": "\n",
    "system": "system\n",
    "user": "user\n",
    "assistant": "assistant\n",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "padding": "<|endoftext|>",
    "time": "<{:.1f} seconds>",
}
"""Exports hold it as ``prompt.template``; those of version 0.1, which do not, follow it too."""
