"""MetaCanvas (arXiv 2512.11464): an MLLM writes a plan on canvas tokens, a diffusion transformer paints it.

    prompt, images ──► mllm.encode (frozen, once) ──► context ──► context connector ───────────► condition
                                                         │                                          │
                       canvas tokens ──► mllm.write ─────┴──► canvas connector, part 1              │
                                                                      │                             │
    noisy latents ──► dit.embed ──► patch tokens ──► canvas connector, part 2 ──► dit.run ──► dit.unembed ──► velocity

``read`` depends on no trained parameter and runs once without gradient; ``plan`` runs once per prompt, ``velocity``
once per noise level.
"""

import flax.linen as nn
from einops import rearrange
from jaxtyping import Array, Float

from metacanvas_jax.connectors.canvas import CanvasConnector
from metacanvas_jax.connectors.context import ContextConnector
from metacanvas_jax.connectors.queries import Queries, append_queries
from metacanvas_jax.dit.base import DiT
from metacanvas_jax.mllm.canvas import CanvasTokens, canvas_positions
from metacanvas_jax.mllm.qwen import Qwen25VL
from metacanvas_jax.types import Condition, Context, Grid, MllmInputs, Plan, Tokens


class MetaCanvas(nn.Module):
    """The whole network. ``canvas`` and ``queries`` may each be absent: that is the paper's set of baselines.

    Parameters lie under ``mllm``, ``context_connector``, ``canvas``, ``canvas_connector``, ``queries`` and ``dit``.
    """

    mllm: Qwen25VL
    context_connector: ContextConnector
    dit: DiT
    canvas: CanvasTokens | None = None
    canvas_connector: CanvasConnector | None = None
    queries: Queries | None = None

    def __call__(
        self, inputs: MllmInputs, latents: Float[Array, "b t h w c"], time: Float[Array, " b"]
    ) -> Float[Array, "b t h w c"]:
        """The velocity from everything at once; ``init`` makes every parameter with it."""
        context = self.read(inputs)
        if self.is_initializing():
            self.mllm.logits(context.hidden)  # the head belongs to the published weights, though nothing here reads it
        return self.velocity(latents, time, self.plan(context))

    def read(self, inputs: MllmInputs) -> Context:
        """The frozen part: hidden states of the prompt and the keys and values the canvas is written against."""
        return self.mllm.encode(inputs)

    def plan(self, context: Context, shape: Grid | None = None, *, deterministic: bool = True) -> Plan:
        """Context tokens in the DiT's width, and the canvas, written by the MLLM and read by the connector.

        ``shape`` is (keyframes, rows, columns) where it differs from the configured canvas.
        """
        hidden, mask = context.hidden, context.mask
        if self.queries is not None:
            written = self.write(context, self.queries(), deterministic=deterministic)
            hidden, mask = append_queries(hidden, mask, rearrange(written, "b 1 1 n d -> b n d"))
        canvas = None
        if self.canvas is not None:
            written = self.write(context, self.canvas(shape), deterministic=deterministic)
            canvas = self.canvas_connector.read(written)
        return Plan(self.context_connector(hidden, deterministic=deterministic), mask, canvas)

    def write(
        self, context: Context, tokens: Float[Array, "k y x d"], *, deterministic: bool = True
    ) -> Float[Array, "b k y x d"]:
        """Runs learnable tokens through the MLLM after its context, at the positions of an image or a video."""
        k, y, x, _ = tokens.shape
        config = self.canvas.config if self.canvas is not None else self.queries.positions
        positions = canvas_positions(context.next_position, (k, y, x), config)
        batch = rearrange(tokens, "k y x d -> 1 (k y x) d").repeat(context.hidden.shape[0], axis=0)
        hidden = self.mllm.write(
            batch, positions, context, bidirectional=config.bidirectional, deterministic=deterministic
        )
        return rearrange(hidden, "b (k y x) d -> b k y x d", k=k, y=y, x=x)

    def velocity(
        self,
        latents: Float[Array, "b t h w c"],
        time: Float[Array, "b"] | Float[Array, "b t"],
        plan: Plan,
        condition: Condition | None = None,
    ) -> Float[Array, "b t h w c"]:
        """Velocity at noise level ``time``. ``condition`` carries what a task adds to the plan (references, ...)."""
        condition = planned(plan, condition)
        tokens = self.embed(latents, time, plan, condition)
        return self.dit.unembed(self.dit.run(tokens, condition))

    def embed(
        self,
        latents: Float[Array, "b t h w c"],
        time: Float[Array, "b"] | Float[Array, "b t"],
        plan: Plan,
        condition: Condition,
    ) -> Tokens:
        """Patch tokens with the canvas on them: what the DiT runs on in place of its own patch embedding."""
        if plan.canvas is None:
            return self.dit.embed(latents, time, condition)
        latents = self.canvas_connector.add_to_latents(latents, plan.canvas)
        return self.canvas_connector.add(self.dit.embed(latents, time, condition), plan.canvas)

    def canvas_features(
        self, latents: Float[Array, "b t h w c"], time: Float[Array, " b"], plan: Plan
    ) -> Float[Array, "b t h w d"]:
        """What the canvas connector adds to the patch tokens (the canvas maps of the paper, figure 5)."""
        condition = planned(plan)
        return self.embed(latents, time, plan, condition).grid - self.dit.embed(latents, time, condition).grid


def planned(plan: Plan, condition: Condition | None = None) -> Condition:
    """A condition that reads the plan's context; everything else a task set stays."""
    condition = Condition(plan.context) if condition is None else condition
    return condition.replace(context=plan.context, mask=plan.mask)
