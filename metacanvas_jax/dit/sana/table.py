"""SANA: names of diffusers ``SanaTransformer2DModel`` and where they go in ``dit/sana/network.py``."""

from metacanvas_jax.dit.sana.network import SanaConfig
from metacanvas_jax.weights.table import DEPTHWISE, POINTWISE, SAME, Entry, Transform, linear


def patch_kernel(patch: int) -> Transform:
    """A convolution ``[out in p p]`` whose stride is its size, as a matrix ``[(p p in) out]``."""
    return Transform(
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(patch, patch, -1, x.shape[-1]).transpose(3, 2, 0, 1),
    )


def table(config: SanaConfig) -> list[Entry]:
    """Every tensor of the published network."""
    n = config.layers
    block, to = "transformer_blocks.{i}", "blocks"
    entries = [
        Entry("patch_embed.proj.weight", "patch_in/kernel", patch_kernel(config.patch)),
        Entry("patch_embed.proj.bias", "patch_in/bias", SAME),
        *linear("time_embed.emb.timestep_embedder.linear_1", "time/embed/fc1"),
        *linear("time_embed.emb.timestep_embedder.linear_2", "time/embed/fc2"),
        *linear("time_embed.linear", "time/project"),
        *linear("caption_projection.linear_1", "caption_fc1"),
        *linear("caption_projection.linear_2", "caption_fc2"),
        Entry("caption_norm.weight", "caption_norm/scale", SAME),
        Entry(f"{block}.scale_shift_table", f"{to}/table", SAME, n),
        Entry(f"{block}.ff.conv_inverted.weight", f"{to}/ffn/expand/kernel", POINTWISE, n),
        Entry(f"{block}.ff.conv_inverted.bias", f"{to}/ffn/expand/bias", SAME, n),
        Entry(f"{block}.ff.conv_depth.weight", f"{to}/ffn/depth/kernel", DEPTHWISE, n),
        Entry(f"{block}.ff.conv_depth.bias", f"{to}/ffn/depth/bias", SAME, n),
        Entry(f"{block}.ff.conv_point.weight", f"{to}/ffn/reduce/kernel", POINTWISE, n),
        Entry("scale_shift_table", "table", SAME),
        *linear("proj_out", "out"),
    ]
    for name, path, bias in ((f"{block}.attn1", f"{to}/attention", None), (f"{block}.attn2", f"{to}/cross", SAME)):
        for z in "qkv":
            entries += linear(f"{name}.to_{z}", f"{path}/{z}", n, bias=bias)
        entries += linear(f"{name}.to_out.0", f"{path}/out", n)
        if config.qk_norm is not None:
            entries += [Entry(f"{name}.norm_{z}.weight", f"{path}/{z}_norm/scale", SAME, n) for z in "qk"]
    return entries
