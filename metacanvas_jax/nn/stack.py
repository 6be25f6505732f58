"""Repeated blocks: one traced block, scanned over stacked parameters, recomputed in the backward pass on request.

What a network keeps for its backward pass is one field of its config, ``remat``:

=================  ===============================================================================================
none               every intermediate result
dots               the products with weights and what "attention" keeps; the rest is recomputed, which costs memory
                   bandwidth but few FLOPs
attention          block inputs, results of attention and their softmax sums: the forward attention is not repeated
full               block inputs only; the forward pass is repeated
offload_attention  as ``attention``, with those results in the host's memory
offload            as ``full``, with the block inputs in the host's memory: the least HBM of all
=================  ===============================================================================================

Offloading moves 2 bytes per token and channel over the host link in each direction and block; it pays where that takes
less time than the block itself, as with long videos.
"""

from typing import Any, Literal, get_args

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PyTree

# Names under which values are found by the policies. The kernels give the first two, inside their derivative rules.
ATTENTION = ("attention_out", "attention_lse")
BLOCK_INPUT = "block_input"

_policies = jax.checkpoint_policies


def _to_host(*names: str) -> Any:
    return _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


REMAT_POLICIES = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(*ATTENTION)
    ),
    "attention": _policies.save_only_these_names(*ATTENTION),
    "full": None,
    "offload_attention": _to_host(*ATTENTION),
    "offload": _to_host(BLOCK_INPUT),
}
Remat = Literal["none", "dots", "attention", "full", "offload_attention", "offload"]
REMAT_CHOICES: tuple[Remat, ...] = get_args(Remat)


def entering(carry: PyTree) -> PyTree:
    """What a block gets from the one before, marked as what ``remat="offload"`` keeps on the host."""
    return jax.tree.map(lambda x: checkpoint_name(x, BLOCK_INPUT), carry)


def recomputed(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """``block`` with one of ``REMAT_CHOICES``."""
    return block if remat == "none" else nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[remat])


def stack(
    block: type[nn.Module], length: int, *, remat: str, inputs: int, scanned: int = 0, unroll: int = 1
) -> type[nn.Module]:
    """``length`` layers of ``block`` whose parameters are stacked along a first axis named ``layers``.

    ``block`` maps ``(carry, *inputs)`` to ``(carry, output)``, and outputs are stacked. Of its ``inputs`` the first
    ``scanned`` are stacked too, so that each layer gets its own; the rest are the same for all. ``remat`` is one of
    ``REMAT_CHOICES``. ``unroll`` layers stand in the program one after the other: more to compile, less to keep in
    stacks, which is worth a tenth of the step of a small model on a CPU. Construct the result with the block's own
    fields and a name.
    """
    return nn.scan(
        recomputed(block, remat),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0,) * scanned + (nn.broadcast,) * (inputs - scanned),
        length=length,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
