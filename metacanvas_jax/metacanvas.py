"""MetaCanvas (arXiv 2512.11464): an MLLM writes a plan on canvas tokens, a diffusion transformer paints it.

    prompt, images ──► mllm.encode (frozen, once) ──► context ──► context connector ───────────► condition
                                                         │                                          │
                       canvas tokens ──► mllm.write ─────┴──► canvas connector, part 1              │
                                                                      │                             │
    noisy latents ──► dit.embed ──► patch tokens ──► canvas connector, part 2 ──► dit.run ──► dit.unembed ──► velocity

``read`` depends on no trained parameter and runs once without gradient; ``plan`` runs once per prompt, ``velocity``
once per noise level. A DiT may keep its own text encoder: the condition is then its states, followed by those of the
context connector if there is one.
"""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from metacanvas_jax.connectors.canvas import CanvasConnector
from metacanvas_jax.connectors.context import ContextConnector
from metacanvas_jax.connectors.queries import Queries, append_queries
from metacanvas_jax.dit.base import DiT
from metacanvas_jax.mllm.canvas import CanvasConfig, CanvasTokens, canvas_positions
from metacanvas_jax.mllm.qwen2_5_vl.network import Qwen25VL
from metacanvas_jax.text.gemma2.network import Gemma2, sana_context
from metacanvas_jax.types import Condition, Context, Grid, MllmInputs, Plan, Tokens


class MetaCanvas(nn.Module):
    """The whole network. What is absent makes the paper's baselines (``build.network``).

    Parameters lie under ``mllm``, ``text``, ``context_connector``, ``canvas``, ``canvas_connector``, ``queries`` and
    ``dit``. ``text_length`` is the number of states that the DiT reads of its own text encoder.
    """

    dit: DiT
    mllm: Qwen25VL | None = None
    context_connector: ContextConnector | None = None
    canvas: CanvasTokens | None = None
    canvas_connector: CanvasConnector | None = None
    queries: Queries | None = None
    text: Gemma2 | None = None
    text_length: int = 300

    def __call__(
        self,
        inputs: MllmInputs,
        latents: Float[Array, "b t h w c"],
        time: Float[Array, " b"],
        condition: Condition | None = None,
    ) -> Float[Array, "b t h w c"]:
        """The velocity from everything at once; ``init`` makes every parameter with it."""
        context = self.read(inputs)
        if self.is_initializing() and self.mllm is not None:
            self.mllm.logits(context.hidden)  # the head belongs to the published weights, though nothing here reads it
        return self.velocity(latents, time, self.plan(context), condition)

    def read(self, inputs: MllmInputs) -> Context:
        """The frozen part: hidden states of the prompt and the keys and values the canvas is written against."""
        if self.mllm is None:
            nothing = jnp.zeros((*inputs.tokens.shape, 0), jnp.float32)
            context = Context(nothing, inputs.mask, None, jnp.zeros(inputs.tokens.shape[:1], jnp.int32))
        else:
            context = self.mllm.encode(inputs, cache=self.canvas is not None or self.queries is not None)
        if self.text is None:
            return context
        states = self.text(inputs.text.tokens, inputs.text.mask)
        states, mask = sana_context(states, inputs.text.mask, self.text_length)
        return context.replace(text=states, text_mask=mask)

    def plan(self, context: Context, shape: Grid | None = None, *, deterministic: bool = True) -> Plan:
        """Context tokens in the DiT's width, and the canvas, written by the MLLM and read by the connector.

        ``shape`` is (keyframes, rows, columns) where it differs from the configured canvas.
        """
        states, mask = self.condition(context, deterministic)
        canvas = None
        if self.canvas is not None:
            written = self.write(context, self.canvas(shape), self.canvas.config, deterministic=deterministic)
            canvas = self.canvas_connector.read(written)
        return Plan(states, mask, canvas)

    def condition(self, context: Context, deterministic: bool) -> tuple[Float[Array, "b l d"], Bool[Array, "b l"]]:
        """What the DiT reads as text: its own encoder's states, then the MLLM's through the context connector."""
        parts = [] if self.text is None else [(context.text, context.text_mask)]
        if self.context_connector is not None:
            hidden, mask = context.hidden, context.mask
            if self.queries is not None:
                written = self.write(context, self.queries(), self.queries.positions, deterministic=deterministic)
                written = rearrange(written, "b 1 1 n d -> b n d")
                if self.queries.config.after_context:
                    hidden, mask = append_queries(hidden, mask, written)
                else:
                    hidden, mask = written, jnp.ones(written.shape[:2], bool)
            parts.append((self.context_connector(hidden, deterministic=deterministic), mask))
        states, masks = zip(*parts, strict=True)
        states = [x.astype(states[0].dtype) for x in states]
        return jnp.concatenate(states, axis=1), jnp.concatenate(masks, axis=1)

    def write(
        self,
        context: Context,
        tokens: Float[Array, "k y x d"],
        config: CanvasConfig,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b k y x d"]:
        """Runs learnable tokens through the MLLM after its context, at the positions that ``config`` says."""
        k, y, x, _ = tokens.shape
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
