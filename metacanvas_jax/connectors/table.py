"""The parts of MetaCanvas that are published nowhere else: names of ``torch_export/connector.py`` and where they go."""

from metacanvas_jax.connectors.canvas import CanvasConnectorConfig
from metacanvas_jax.connectors.context import ContextConnectorConfig
from metacanvas_jax.weights.table import DEPTHWISE, LINEAR, POINTWISE, SAME, Entry, linear, norm, under


def canvas_connector(config: CanvasConnectorConfig) -> list[Entry]:
    """Entries of the canvas connector."""
    entries = [Entry("norm.weight", "norm/scale", SAME), *linear("zero", "zero")]
    if config.vanilla_block:
        entries += linear("project", "project")
        entries += [*norm("block.norm1", "block/norm1"), *norm("block.norm2", "block/norm2")]
        for name in ("q", "k", "v", "out", "fc1", "fc2"):
            entries += linear(f"block.{name}", f"block/{name}")
    if not config.dit_block:
        return entries
    if config.time_modulation:
        entries += linear("time.emb.timestep_embedder.linear_1", "time/embed/fc1")
        entries += linear("time.emb.timestep_embedder.linear_2", "time/embed/fc2")
        entries += linear("time.linear", "time/project")
    entries.append(Entry("dit.scale_shift_table", "dit/table", SAME))
    entries += [Entry(f"dit.attn1.to_{z}.weight", f"dit/attention/{z}/kernel", LINEAR) for z in "qkv"]
    entries += linear("dit.attn1.to_out.0", "dit/attention/out")
    entries += linear("dit.ff.conv_inverted", "dit/ffn/expand", kernel=POINTWISE)
    entries += linear("dit.ff.conv_depth", "dit/ffn/depth", kernel=DEPTHWISE)
    entries.append(Entry("dit.ff.conv_point.weight", "dit/ffn/reduce/kernel", POINTWISE))
    return [*entries, *linear("dit_zero", "dit_zero")]


def context_connector(config: ContextConnectorConfig) -> list[Entry]:
    """Entries of the context connector."""
    if config.kind == "identity":
        return []
    entries = [*linear("fc1", "fc1"), *linear("fc2", "fc2")]
    return [*entries, Entry("norm.weight", "norm/scale", SAME)] if config.out_norm else entries


def table(
    *,
    canvas: CanvasConnectorConfig | None,
    context: ContextConnectorConfig | None,
    queries: bool,
    added: list[Entry],
) -> list[Entry]:
    """Every tensor of ``connector/``; paths are relative to the parameters of ``MetaCanvas``.

    ``added`` lists those of layers that were added to the published DiT, relative to its own parameters.
    """
    entries = []
    if canvas is not None:
        entries.append(Entry("canvas.tokens", "canvas/tokens", SAME))
        entries += under(canvas_connector(canvas), "canvas_connector/", "canvas_connector.")
    if context is not None:
        entries += under(context_connector(context), "context_connector/", "context_connector.")
    if queries:
        entries.append(Entry("queries.tokens", "queries/tokens", SAME))
    return [*entries, *under(added, "dit/", "dit.")]
