"""Repeated blocks: one block is traced and scanned over stacked parameters.

The field ``remat`` of a network's config decides what the forward pass saves for the backward pass:

=================  ===============================================================================================
none               every intermediate result
dots               the products with weights, and what "attention" saves; recomputing the rest costs memory bandwidth
                   but few FLOPs
hidden             what "attention" saves, and the hidden units of feed-forwards before their activation: two thirds of
                   the products of most blocks are not repeated
attention          block inputs, results of attention and their softmax sums; attention is not recomputed
full               block inputs only; the whole forward pass is recomputed
offload_attention  as ``attention``, with the results of attention in the host's memory
offload            as ``full``, with the block inputs in the host's memory; this needs the least HBM
=================  ===============================================================================================

Offloading moves 2 bytes per token and channel over the host link, per block and direction. It is useful where this
takes less time than the block itself, as for long videos.
"""

from typing import Any, Literal, get_args

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, PyTree, Shaped

# The names of values that the policies save. The attention kernels set the first two, inside their derivative rules.
ATTENTION = ("attention_out", "attention_lse")
BLOCK_INPUT = "block_input"
HIDDEN = "hidden_units"

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
    "hidden": _policies.save_only_these_names(*ATTENTION, HIDDEN),
    "attention": _policies.save_only_these_names(*ATTENTION),
    "full": None,
    "offload_attention": _to_host(*ATTENTION),
    "offload": _to_host(BLOCK_INPUT),
}
Remat = Literal["none", "dots", "hidden", "attention", "full", "offload_attention", "offload"]
REMAT_CHOICES: tuple[Remat, ...] = get_args(Remat)


def entering(carry: PyTree) -> PyTree:
    """Marks the input of a block, so that ``remat="offload"`` can keep it in the host's memory."""
    return jax.tree.map(lambda x: checkpoint_name(x, BLOCK_INPUT), carry)


def hidden_units(x: Shaped[Array, "*n"]) -> Shaped[Array, "*n"]:
    """Marks the hidden units of a feed-forward before their activation, for ``remat="hidden"``."""
    return checkpoint_name(x, HIDDEN)


def recomputed(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """``block``, rematerialised by one of ``REMAT_CHOICES``."""
    return block if remat == "none" else nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[remat])


def stack(
    block: type[nn.Module], length: int, *, remat: str, inputs: int, scanned: int = 0, unroll: int = 1
) -> type[nn.Module]:
    """``length`` layers of ``block`` whose parameters are stacked along a first axis named ``layers``.

    ``block`` maps ``(carry, *inputs)`` to ``(carry, output)``, and outputs are stacked. ``inputs`` is the number of
    inputs. The first ``scanned`` of them are stacked along the layers; all layers share the others. ``remat`` is one of
    ``REMAT_CHOICES``. ``unroll`` layers are written out in each iteration of the loop. This takes longer to compile and
    saves a tenth of the step of a small model on a CPU. Construct the result with the block's own fields and a name.
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
