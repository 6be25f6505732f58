"""The stages of ``gpu_full.py`` in PyTorch: diffusers' transformer with transformers' MLLM, made trainable.

The reference network is the project's torch package on the folder of an export. It trains what the case trains, in the
same precision: float32 parameters under autocast to bfloat16, frozen parameters in bfloat16. Blocks of the transformer
are recomputed in the backward pass and compiled by ``torch.compile``, one by one, as diffusers recommends; of the MLLM
the feed-forward layers are compiled. Attention is SDPA. AdamW is fused.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_full_cases import Case, setup_of
from gpu_full_folders import export_folder
from gpu_full_ours import SECONDS, TIMED, TRIED, program_batch, text_length, vocabulary
from torch import Tensor, nn

from metacanvas_jax import registry
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.dit.torch_side import Given, Plan
from metacanvas_jax.mllm.torch_side import Inputs
from metacanvas_jax.plan.programs import with_latents
from metacanvas_jax.torch_export import load
from metacanvas_jax.torch_export.lora import Adapters, read_diffusers
from metacanvas_jax.train.parameters import param_shapes
from metacanvas_jax.trees import flat, partition

Result = dict[str, Any]


class Reference:
    """The networks of an export on the device, with what trains in float32."""

    def __init__(self, case: Case, place: Path, small: bool, *, whole: bool):
        self.small = small
        self.setup = with_latents(setup_of(case, place / "folders", small))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.compiler = "inductor" if self.device.type == "cuda" else "eager"  # a CPU only tries the script
        folder = export_folder(case, place / "folders")
        index = load.read_index(folder)
        adapters, index["transformer"]["lora"] = index["transformer"]["lora"], None
        find = load.Finder(folder, index, place / "folders" / case.folder, torch.bfloat16, self.device)
        connector = find.connector()
        self.backbone = find.backbone(place / "folders" / case.folder / "transformer", connector)
        self.backbone.settings = index["settings"] | {"mask_context": False}  # all tokens are real: a mask hides none
        net = self.backbone.net
        self.index, self.lora = index, None
        if adapters is not None:
            self.lora = Adapters(net, *read_diffusers(folder / adapters)).to(self.device, torch.bfloat16)
        self.mllm = self.text = None
        if whole:
            self.mllm = find.mllm(self.setup.mllm.weights)
            if index["text"] is not None:
                self.text = find.text(self.setup.text.weights)
        for module in (net, connector, self.lora, None if self.mllm is None else self.mllm.net):
            if module is not None:
                module.requires_grad_(False)
        for parameter in self.trained(whole):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        net.train()
        net.enable_gradient_checkpointing()
        for name in ("transformer_blocks", "single_transformer_blocks", "blocks"):
            for block in getattr(net, name, ()):
                block.compile(backend=self.compiler)
        if self.mllm is not None:
            for layer in self.mllm.net.model.language_model.layers:
                layer.mlp.compile(backend=self.compiler)

    def trained(self, whole: bool) -> list[nn.Parameter]:
        """The parameters that the case trains; without ``whole`` those of the transformer."""
        setup, named = self.setup, dict(self.backbone.net.named_parameters())
        ours = flat(partition(param_shapes(setup), setup.train.rules)[0])
        table = registry.of(setup.dit).table(setup.dit)
        names = [e.names(layer)[0] for e in table if f"dit/{e.path}" in ours for layer in e.tensors]
        found = [named[name] for name in names]
        parts: list[Any] = [self.lora, self.backbone.connector.dit]
        if whole:
            parts = [self.lora, self.backbone.connector, None if self.mllm is None else self.mllm.adapters]
        return found + [parameter for part in parts if part is not None for parameter in part.parameters()]

    def velocity(self, latents: Tensor, level: Tensor, plan: Plan, given: Given) -> Tensor:
        """As ``Backbone.velocity``, with a noise level per sample."""
        if plan.canvas is not None:
            latents = self.backbone.connector.canvas_connector.add_to_latents(latents, plan.canvas)
        return self.backbone.run(latents, level, plan, given)

    def written(self, inputs: Inputs, prompts: list[str]) -> Plan:
        """The plan of a batch: contexts without gradient, the canvas with it."""
        connector, parts = self.backbone.connector, []
        context = self.mllm.read(inputs)
        if self.text is not None:
            parts.append(self.text(prompts, [True] * len(prompts)))
        if connector.context_connector is not None:
            parts.append((connector.context_connector(context.hidden), context.mask))
        # `write` is made for drawing and keeps no gradient; what it wraps does.
        write: Any = type(self.mllm).write
        tokens = write.__wrapped__(self.mllm, context, connector.canvas(), self.index["canvas"])
        states = torch.cat([states for states, _ in parts], dim=1)
        mask = torch.cat([mask for _, mask in parts], dim=1)
        return Plan(states, mask, connector.canvas_connector.read(tokens))


def step(case: Case, place: Path, small: bool) -> Result:
    """The whole step of MetaCanvas, on latents."""
    start = time.perf_counter()
    reference = Reference(case, place, small, whole=True)
    latents, given = random_latents(reference.setup, reference.device)
    inputs = random_inputs(reference.setup, reference.device)
    prompts = ["a red cat " * 200] * len(latents)
    loaded = time.perf_counter()
    forward = lambda noisy, level: reference.velocity(noisy, level, reference.written(inputs, prompts), given)  # noqa: E731
    found = timed(forward, reference, latents, whole=True)
    return found | {"import_s": loaded - start, "first_step_s": loaded - start + found["warmup_s"]}


def dit(case: Case, place: Path, small: bool) -> Result:
    """Forward pass, backward pass and update of the transformer alone."""
    reference = Reference(case, place, small, whole=False)
    latents, given = random_latents(reference.setup, reference.device)
    width, length = reference.setup.dit.context_width, text_length(reference.setup)
    states = torch.randn(len(latents), length, width, device=reference.device, dtype=torch.bfloat16)
    plan = Plan(states, torch.ones(len(latents), length, dtype=torch.bool, device=reference.device))
    forward = lambda noisy, level: reference.velocity(noisy, level, plan, given)  # noqa: E731
    return timed(forward, reference, latents, whole=False)


def timed(forward: Callable[[Tensor, Tensor], Tensor], reference: Reference, latents: Tensor, *, whole: bool) -> Result:
    """Trains on the same latents; the keys are those of ``gpu_full_ours.timed``."""
    parameters, device = reference.trained(whole), reference.device
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=device.type == "cuda")
    seconds, begun, loss = [], time.perf_counter(), torch.zeros(())
    for i in range((TRIED if reference.small else TIMED) + 1):
        start = time.perf_counter()
        noise, level = torch.randn_like(latents), torch.rand(len(latents), device=device)
        part = level.view(-1, 1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = forward(part * noise + (1 - part) * latents, level)
        loss = torch.mean((velocity.float() - (noise - latents)) ** 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if i >= 3 and time.perf_counter() - begun > SECONDS:
            break
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss of step {len(seconds)} is {loss.item()}")
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "step_s": statistics.median(seconds[1:]),
        "warmup_s": seconds[0],
        "steps": len(seconds) - 1,
        "loss": loss.item(),
        "trained": sum(parameter.numel() for parameter in parameters),
        "samples": len(latents),
        "peak_GiB": peak,
    }


def random_latents(setup: Experiment, device: torch.device) -> tuple[Tensor, Given]:
    """Latents ``[b c t h w]`` of the target, and of the source of an edit."""
    shapes = program_batch(setup)
    torch.manual_seed(0)

    def drawn(name: str) -> Tensor:
        b, t, h, w, c = shapes[name].shape
        return torch.randn(b, c, t, h, w, device=device)

    return drawn("latents"), Given(source=drawn("source_latents") if "source_latents" in shapes else None)


def random_inputs(setup: Experiment, device: torch.device) -> Inputs:
    """Prompts of the bucket's length, media at their beginning, all of them real tokens."""
    shapes = program_batch(setup)
    b, length = shapes["tokens"].shape
    tokens = torch.randint(0, vocabulary(setup), (b, length))
    positions = torch.arange(length).expand(3, b, length).contiguous()
    return Inputs(tokens, positions, torch.ones(b, length, dtype=torch.bool), list(random_media(shapes))).to(device)


def random_media(shapes: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """Every medium of every sample."""
    for group in shapes.get("media", ()):
        samples, count, patches, values = group.patches.shape
        merged = group.slots.shape[-1]
        for sample in range(samples):
            for i in range(count):
                columns = torch.arange(i * merged, (i + 1) * merged)
                places = torch.full_like(columns, sample), columns
                yield torch.randn(patches, values), torch.tensor([group.grid]), places


STAGES = {"torch_step": step, "torch_dit": dit}
