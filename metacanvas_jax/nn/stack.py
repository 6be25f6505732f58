"""Repeated blocks: one traced block, scanned over stacked parameters, recomputed in the backward pass on request."""

import flax.linen as nn
import jax

REMAT_POLICIES = {
    "full": None,  # keep only the input of every block
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the products with weights as well
}
REMAT_CHOICES = ("none", *REMAT_POLICIES)


def stack(block: type[nn.Module], length: int, *, remat: str, inputs: int, scanned: int = 0) -> type[nn.Module]:
    """``length`` layers of ``block`` whose parameters are stacked along a first axis named ``layers``.

    ``block`` maps ``(carry, *inputs)`` to ``(carry, output)``, and outputs are stacked. Of its ``inputs`` the first
    ``scanned`` are stacked too, so that each layer gets its own; the rest are the same for all. ``remat`` is one of
    ``REMAT_CHOICES``. Construct the result with the block's own fields and a name.
    """
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0,) * scanned + (nn.broadcast,) * (inputs - scanned),
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
