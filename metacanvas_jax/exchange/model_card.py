"""The model card of an export, made from the run: what it is, how it was trained, how it scored, whose bases it has."""

from collections.abc import Mapping
from typing import Any

from metacanvas_jax import registry
from metacanvas_jax.config.networks import mllm_config
from metacanvas_jax.config.schema import Experiment

DRAWINGS = ("OpenMoji drawings", "CC BY-SA 4.0")


def model_card(setup: Experiment, index: Mapping[str, Any], scores: Mapping[str, Any] | None) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    bases = _bases(setup, index)
    lines = [
        "---",
        "library_name: metacanvas_jax",
        "tags: [metacanvas, diffusion, multimodal]",
        "---",
        "",
        f"# {setup.name}",
        "",
        "Trained with [metacanvas_jax](https://arxiv.org/abs/2512.11464): an MLLM plans on canvas tokens, a diffusion",
        "transformer paints the plan."
        if setup.objective == "paint"
        else "transformer paints the plan. The MLLM alone.",
        "",
        "## What is in it",
        "",
        *(f"- `{name}/`: {what}" for name, what in _contents(index)),
        "",
        f"Step {index['step']}, {'moving average of the' if index['ema'] else 'raw'} parameters, {index['dtype']}.",
        "",
        "## How to run it",
        "",
        *_usage(setup, index),
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _training(setup)),
        "",
        "The whole config is `run_config.json`.",
        "",
        "## Scores",
        "",
        *_scores(scores),
        "",
        "## Bases and licences",
        "",
        *(f"- {name}: {licence}" for name, licence in bases),
        *(["- no published weights"] if not bases else []),
        "",
        "What was trained here is a derivative of its bases: their licences bind it. Read those that came with the",
        "weights you use; this list is no legal advice.",
    ]
    return "\n".join(lines) + "\n"


def _bases(setup: Experiment, index: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and licence of everything that was not made by this run."""
    networks = []
    mllm, transformer, vae = index["mllm"], index.get("transformer") or {}, index.get("vae") or {}
    if mllm is not None and mllm["folder"] is None and mllm["base"]:
        networks.append(mllm_config(setup))
    own = setup.vae is not None and not registry.of(setup.vae).published
    if transformer.get("base") or (vae.get("base") and not own):
        networks.append(setup.dit)
    if setup.text is not None and setup.text.weights:
        networks.append(setup.text.encoder)
    if own or setup.objective == "understand":  # fitted to, or taught with, drawings
        networks.append(setup.vae if own else None)
    return [DRAWINGS if network is None else registry.of(network).licence(network) for network in networks]


def _contents(index: Mapping[str, Any]) -> list[tuple[str, str]]:
    transformer, mllm, vae = index.get("transformer") or {}, index["mllm"] or {}, index.get("vae") or {}
    found = [
        (index.get("connector"), "canvas tokens and connectors (safetensors, `config.json`)"),
        (mllm.get("lora"), "adapters of the MLLM, in PEFT's format, for canvas positions only (see its README)"),
        (mllm.get("folder"), "the MLLM, in transformers' format"),
        (transformer.get("folder"), "the diffusion transformer, in diffusers' format"),
        (transformer.get("partial"), "the trained part of the diffusion transformer, under diffusers' names"),
        (transformer.get("lora"), "adapters of the diffusion transformer, for `load_lora_adapter`"),
        (vae.get("folder"), "the autoencoder"),
    ]
    return [(name, what) for name, what in found if name]


def _usage(setup: Experiment, index: Mapping[str, Any]) -> list[str]:
    if setup.objective != "paint":
        return ["`AutoModelForImageTextToText.from_pretrained(FOLDER + '/mllm')` of transformers."]
    arguments = ""
    if index["mllm"] is not None and index["mllm"]["folder"] is None:
        arguments += ', mllm="MLLM-FOLDER"'
    if index["transformer"]["folder"] is None or index["vae"]["folder"] is None:
        arguments += ', base="DIFFUSERS-PIPELINE-FOLDER"'
    return [
        "```python",
        "from metacanvas_jax.torch_export import MetaCanvasPipeline",
        "",
        f'pipeline = MetaCanvasPipeline.from_pretrained("THIS-FOLDER"{arguments})',
        'picture = pipeline(prompt="a red cat left of a blue car")[0]',
        'picture.save("picture.png")',
        "```",
    ]


def _training(setup: Experiment) -> list[tuple[str, Any]]:
    train, optimizer = setup.train, setup.optimizer
    return [
        ("objective", setup.objective),
        ("steps, batch", f"{train.steps}, {train.batch} x {train.accumulate}"),
        ("learning rate", f"{optimizer.learning_rate:g}, {optimizer.schedule}, warm-up {optimizer.warmup_steps}"),
        ("trained", "; ".join(f"`{regex}` {action}" for regex, action in train.rules)),
        ("data", setup.data.path or "see `run_config.json`"),
        ("canvas", "none" if setup.canvas is None else " x ".join(map(str, setup.canvas.shape))),
    ]


def _scores(scores: Mapping[str, Any] | None) -> list[str]:
    if scores is None:
        return ["None were computed (`metacanvas evaluate --run RUN` writes them)."]
    lines = []
    for split, values in scores.items():
        numbers = {"overall": values.get("overall"), **values.get("categories", {})}
        shown = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items() if value is not None)
        lines.append(f"- {split}: {shown}")
    return lines
