"""MetaCanvas (arXiv 2512.11464): an MLLM writes a plan on canvas tokens, a diffusion transformer (DiT) paints it.

    prompt, images ──► mllm.encode (frozen, once) ──► context ──► context connector ──────► text states
                                                         │                                      │
                       canvas tokens ──► mllm.write ─────┴──► canvas connector, part 1          │
                                                                      │                         │
    noisy latents ──► dit.embed ──► patch tokens ──► canvas connector, part 2 ──► dit.run ──► dit.unembed ──► velocity

``read`` depends on no trained parameter and runs once without gradient. ``plan`` runs once per prompt, ``velocity``
once per noise level.

- *Gated adapters.* The MLLM is causal and its LoRA adapters act on canvas tokens only. Its states of the prompt are
  therefore those of the published model, and may come from a cache on disk.
- *Zero initialisation.* Both parts of the canvas connector end in a linear layer of zeros. A new connector changes
  nothing, and training starts from the DiT as it was published.
- *Interpolation.* The canvas has a grid of its own, with fewer cells than the latents, fixed or by a ratio to theirs.
  The connector interpolates it linearly to the grid of patch tokens, so that one canvas serves every size of picture.
- *Keyframes.* For a video the canvas has several keyframes. The MLLM numbers them like the frames of a video, and the
  connector interpolates them in time.
- *References.* Tokens of reference images or frames get no canvas: the DiT only attends to them.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from metacanvas_jax.connectors.canvas import CanvasConnector
from metacanvas_jax.connectors.context import ContextConnector, joined, without_first
from metacanvas_jax.connectors.queries import Queries
from metacanvas_jax.dit.base import DiT
from metacanvas_jax.mllm.base import Mllm
from metacanvas_jax.mllm.canvas import CanvasTokens, write_canvas
from metacanvas_jax.text.base import TextEncoder
from metacanvas_jax.types import NOTHING, Context, Given, Grid, MllmInputs, Plan, States, Tokens


class MetaCanvas(nn.Module):
    """The whole network. Parts that are None give the baselines of the paper.

    Parameters lie under ``mllm``, ``text``, ``context_connector``, ``canvas``, ``canvas_connector``, ``queries`` and
    ``dit``. ``text`` is the text encoder of a DiT that keeps its own; ``queries`` are those of MetaQuery (a baseline).
    """

    dit: DiT
    mllm: Mllm | None = None
    context_connector: ContextConnector | None = None
    canvas: CanvasTokens | None = None
    canvas_connector: CanvasConnector | None = None
    queries: Queries | None = None
    text: TextEncoder | None = None

    def __call__(
        self,
        inputs: MllmInputs,
        latents: Float[Array, "b t h w c"],
        time: Float[Array, " b"],
        given: Given = NOTHING,
    ) -> Float[Array, "b t h w c"]:
        """The velocity from all inputs at once; ``init`` makes every parameter with it."""
        return self.velocity(latents, time, self.plan(self.read(inputs)), given)

    def read(self, inputs: MllmInputs) -> Context:
        """The frozen part: states of the prompt, and the keys and values that canvas tokens attend to."""
        if self.mllm is None:
            nothing = jnp.zeros((*inputs.tokens.shape, 0), jnp.float32)
            context = Context(nothing, inputs.mask, None, jnp.zeros(inputs.tokens.shape[:1], jnp.int32))
        else:
            context = self.mllm.encode(inputs, cache=self.canvas is not None or self.queries is not None)
        return context if self.text is None else context.replace(text=self.text(inputs.text))

    def plan(self, context: Context, shape: Grid | None = None, *, deterministic: bool = True) -> Plan:
        """What the DiT reads as text, and the canvas: written by the MLLM, then brought to the DiT's width.

        ``shape`` is (keyframes, rows, columns) of the canvas where it differs from the configured one.
        """
        text, canvas = self.text_states(context, deterministic), None
        if self.canvas is not None:
            tokens = self.canvas(shape)
            written = write_canvas(self.mllm, tokens, context, self.canvas.config, deterministic=deterministic)
            canvas = self.canvas_connector.read(written)
        return Plan(text, canvas)

    def text_states(self, context: Context, deterministic: bool) -> States:
        """States of the DiT's own text encoder, followed by those of the MLLM through the context connector."""
        parts = [] if context.text is None else [context.text]
        if self.context_connector is not None:
            prompt = States(context.hidden, context.mask)
            if self.queries is not None:
                prompt = self.queries.states(self.mllm, context, deterministic=deterministic)
            states = self.context_connector(prompt.states, deterministic=deterministic)
            parts.append(States(states, without_first(prompt.mask, self.context_connector.config.skip)))
        return joined(*parts)

    def velocity(
        self,
        latents: Float[Array, "b t h w c"],
        time: Float[Array, "b"] | Float[Array, "b t"],
        plan: Plan,
        given: Given = NOTHING,
    ) -> Float[Array, "b t h w c"]:
        """Velocity at noise level ``time``; ``given`` is what the task gives besides the plan (references, ...)."""
        tokens = self.embed(latents, time, plan, given)
        return self.dit.unembed(self.dit.run(tokens, plan.text))

    def embed(
        self,
        latents: Float[Array, "b t h w c"],
        time: Float[Array, "b"] | Float[Array, "b t"],
        plan: Plan,
        given: Given,
    ) -> Tokens:
        """Patch tokens with the canvas added: the DiT runs on them instead of its own patch tokens."""
        if plan.canvas is None:
            return self.dit.embed(latents, time, plan.text, given)
        added = _where(plan.kept, self.canvas_connector.add_to_latents(latents, plan.canvas), latents)
        tokens = self.dit.embed(added, time, plan.text, given)
        drawn = self.canvas_connector.add(tokens, plan.canvas)
        return drawn.replace(grid=_where(plan.kept, drawn.grid, tokens.grid))


def _where(
    kept: Bool[Array, " b"] | None, x: Float[Array, "b *n"], other: Float[Array, "b *n"]
) -> Float[Array, "b *n"]:
    """The samples of ``x`` that are kept, those of ``other`` in place of the rest; ``x`` itself where all are kept."""
    return x if kept is None else jnp.where(kept.reshape(-1, *(1 for _ in x.shape[1:])), x, other)
