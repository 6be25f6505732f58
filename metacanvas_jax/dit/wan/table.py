"""Weights of Wan transformers: diffusers ``WanTransformer3DModel`` (folder ``transformer`` of its pipelines)."""

from metacanvas_jax.dit.wan.network import WanConfig
from metacanvas_jax.weights.table import LINEAR, SAME, Entry, Transform, half_split, linear, then


def table(config: WanConfig) -> list[Entry]:
    """Every published tensor of the network, paths relative to its own parameters.

    diffusers numbers a block's norms in the order of their use: ``norm2`` is the one before the cross-attention.
    """
    block, layers = "blocks.{i}", config.layers
    entries = [
        *linear("patch_embedding", "patch_in", kernel=patch_kernel(config)),
        *linear("condition_embedder.time_embedder.linear_1", "time/fc1"),
        *linear("condition_embedder.time_embedder.linear_2", "time/fc2"),
        *linear("condition_embedder.time_proj", "time_chunks"),
        *linear("condition_embedder.text_embedder.linear_1", "context_fc1"),
        *linear("condition_embedder.text_embedder.linear_2", "context_fc2"),
        Entry("scale_shift_table", "table", ROW),
        *linear("proj_out", "out"),
        Entry(f"{block}.scale_shift_table", "blocks/table", ROW, layers),
        *linear(f"{block}.ffn.net.0.proj", "blocks/up", layers),
        *linear(f"{block}.ffn.net.2", "blocks/down", layers),
    ]
    # Only the self-attention rotates, so only its q and k go from interleaved pairs to half-split heads.
    for name, path, split in (("attn1", "self", half_split(config.head_width)), ("attn2", "cross", SAME)):
        for theirs, ours, order in (
            ("to_q", "q", split),
            ("to_k", "k", split),
            ("to_v", "v", SAME),
            ("to_out.0", "out", SAME),
        ):
            entries += linear(f"{block}.{name}.{theirs}", f"blocks/{path}/{ours}", layers, then(LINEAR, order), order)
        for norm in "qk":
            entries.append(
                Entry(f"{block}.{name}.norm_{norm}.weight", f"blocks/{path}/{norm}_norm/scale", split, layers)
            )
    if config.cross_norm:
        entries.append(Entry(f"{block}.norm2.weight", "blocks/cross_norm/scale", SAME, layers))
        entries.append(Entry(f"{block}.norm2.bias", "blocks/cross_norm/bias", SAME, layers))
    return entries


def fresh(config: WanConfig) -> list[str]:
    """Parameters that no published folder holds; they start at zero, which leaves the published behaviour alone."""
    return ["extra_in/kernel"] if config.extra_channels else []


ROW = Transform(lambda x: x[0], lambda x: x[None])


def patch_kernel(config: WanConfig) -> Transform:
    """A convolution's ``[out, channel, frame, row, column]`` as the ``[in, out]`` of a linear layer over patches."""
    shape = (config.width, config.latent_channels, *config.patch)
    return Transform(lambda x: x.reshape(x.shape[0], -1).T, lambda x: x.T.reshape(x.shape[1], *shape[1:]))


def added(config: WanConfig) -> list[Entry]:
    """Tensors of the further input channels, which the published network does not have."""
    return [Entry("extra_in.weight", "extra_in/kernel", _patches(config))] if config.extra_channels else []


def _patches(config: WanConfig) -> Transform:
    """A convolution ``[out, channel, frame, row, column]`` as the ``[in, out]`` of a linear layer over patches."""
    shape = (config.extra_channels, *config.patch)
    return Transform(lambda x: x.reshape(x.shape[0], -1).T, lambda x: x.T.reshape(x.shape[1], *shape))
