"""The scores that an attention kernel computes in vain, because it skips whole blocks of a causal mask only.

Sources of measured jobs state the blocks of their kernels; ``calibration/jobs.json`` has them beside the shares that
follow (``attention/computed``).
"""

from collections.abc import Mapping, Sequence

from language_model import Decoder, visible_pairs

BACKWARD = {"backward": 5, "dkv": 4, "dq": 3}
"""Products of a fused backward pass, of a kernel for the gradients of keys and values, of one for those of queries."""

Blocks = Mapping[str, Sequence[int]]
"""(queries, keys) of the block that each kernel of a job skips or computes; "forward" and those of ``BACKWARD``."""


def computed_pairs(length: int, block: Sequence[int], window: int | None = None) -> int:
    """Pairs of a query and a key in the blocks that a kernel computes, of one head over ``length`` tokens.

    A query sees itself and the ``window`` - 1 tokens before it, or all before it. Blocks are (queries, keys).
    """
    queries, keys = block
    pairs = 0
    for start in range(0, length, queries):
        first = 0 if window is None else max(0, start - window + 1)
        last = min(start + queries, length) - 1
        pairs += queries * keys * (last // keys - first // keys + 1)
    return pairs


def computed_shares(model: Decoder, length: int, blocks: Blocks) -> tuple[float, float]:
    """Computed over visible pairs of all layers, forward and backward; kernels of a backward pass by their products."""
    local = 0 if model.window is None else model.period - 1
    visible = visible_pairs(length, length) + local * visible_pairs(length, model.window or length)

    def share(kernel: str) -> float:
        whole = computed_pairs(length, blocks[kernel])
        return (whole + local * computed_pairs(length, blocks[kernel], model.window)) / visible

    backward = [name for name in BACKWARD if name in blocks]
    products = sum(BACKWARD[name] for name in backward)
    return share("forward"), sum(BACKWARD[name] * share(name) for name in backward) / products
