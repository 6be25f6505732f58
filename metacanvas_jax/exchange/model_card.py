"""The model card of an export, made from the run: what it is, how it was trained, how it scored, whose bases it has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metacanvas_jax import registry
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import DRAWN, EMOJI, SourceSection
from metacanvas_jax.config.weights import weight_folders
from metacanvas_jax.weights.sources import Source

DRAWINGS = ("OpenMoji drawings", "CC BY-SA 4.0")
PACKAGES = ("emoji of npm packages", "Noto Apache-2.0, Fluent MIT, Twemoji CC BY 4.0")


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
        *(f"- {name}: {licence}" for name, licence in [*bases, *_data_licences(setup)]),
        *(["- no weights of others"] if not bases else []),
        "",
        "What was trained here is a derivative of its bases and data: their licences bind it. Read those that came",
        "with the weights and the data you use; this list is no legal advice.",
    ]
    return "\n".join(lines) + "\n"


def _bases(setup: Experiment, index: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and licence of every folder of weights that the run read."""
    if setup.objective != "paint":
        return []
    found = {source.folder: source for source in reversed(weight_folders(setup).values())}  # a DiT's covers its VAE
    return [_base(setup, index, source) for source in found.values()]


def _base(setup: Experiment, index: Mapping[str, Any], source: Source) -> tuple[str, str]:
    names = {"mllm": "mllm", "dit": "transformer", "vae": "vae", "text": "text"}
    base = (index.get(names[source.network.family]) or {}).get("base") or str(source.folder)
    name = f"`{Path(base).name}`, the {index_name(source)}"
    record = registry.of(setup.dit) if source.network.family == "vae" and source.network.published else source.network
    if source.saved and base == str(source.folder):
        return name, "trained or fitted by this project: the licences of the data it was made from"
    published, licence = record.licence(setup.dit if record.family == "dit" else source.config)
    return name, f"{licence}, as published for {published}"


def index_name(source: Source) -> str:
    """What a network is called in a card."""
    names = {"mllm": "MLLM", "dit": "diffusion transformer", "vae": "autoencoder", "text": "text encoder"}
    return names[source.network.family]


def _data_licences(setup: Experiment) -> list[tuple[str, str]]:
    """Every kind of data that the run trained on, with its licence as far as this project knows it."""
    if not setup.sources:
        return [DRAWINGS]
    known = {**dict.fromkeys(DRAWN, DRAWINGS), **dict.fromkeys(EMOJI, PACKAGES)}
    unknown = "its licence is not recorded; whoever publishes this model adds it here"
    found = [known.get(source.kind, (f"data of `{_public(source.path)}`", unknown)) for source in setup.sources]
    return list(dict.fromkeys(found))


def _data(setup: Experiment) -> str:
    if not setup.sources:
        return f"{setup.data.count:,} OpenMoji scenes" + (
            f" in `{_public(setup.data.path)}`" if setup.data.path else ""
        )
    return "; ".join(f"{source.task}: {source.kind} {_where(source)}".rstrip() for source in setup.sources)


def _where(source: SourceSection) -> str:
    """Where samples come from: the name of a folder or file, or the seed of drawings."""
    drawn = source.kind in DRAWN
    place = f"`{_public(source.path)}`" if source.path else "drawn from its seed" if drawn else ""
    return place + (f", {source.count:,} samples" if drawn else "")


def _public(path: str) -> str:
    """The end of a path, which names the data; folders above it say more of a machine and its user than of the data."""
    *_, folder, name = ("", "", *Path(path).parts)
    return f"{folder}/{name}" if set(name) & set("*?[{") and folder else name


def _contents(index: Mapping[str, Any]) -> list[tuple[str, str]]:
    transformer, mllm, vae = index.get("transformer") or {}, index["mllm"] or {}, index.get("vae") or {}
    found = [
        (index.get("connector"), "canvas tokens and connectors (safetensors, `config.json`)"),
        (mllm.get("lora"), "adapters of the MLLM, in PEFT's format, for canvas positions only (see its README)"),
        (mllm.get("folder"), "the MLLM, in transformers' format"),
        (transformer.get("folder"), "the diffusion transformer, in diffusers' format"),
        (transformer.get("partial"), "the trained part of the diffusion transformer, under diffusers' names"),
        (transformer.get("lora"), "adapters of the diffusion transformer, for `load_lora_adapter`"),
        ((index.get("text") or {}).get("folder"), "the text encoder, in transformers' format, and its tokenizer"),
        (vae.get("folder"), "the autoencoder"),
    ]
    return [(name, what) for name, what in found if name]


def _usage(setup: Experiment, index: Mapping[str, Any]) -> list[str]:
    if setup.objective != "paint":
        return ["`AutoModelForImageTextToText.from_pretrained(FOLDER + '/mllm')` of transformers."]
    arguments = ""
    if index["mllm"] is not None and index["mllm"]["folder"] is None:
        arguments += ', mllm="MLLM-FOLDER"'
    parts = [index[name] for name in ("transformer", "vae", "text") if index[name] is not None]
    if any(part["folder"] is None for part in parts):
        arguments += ', base="DIFFUSERS-PIPELINE-FOLDER"'
    draws = ['picture = pipeline(prompt="a red cat left of a blue car")[0]', 'picture.save("picture.png")']
    if setup.shapes[0].frames > 1:
        draws = [
            'frames = pipeline(prompt="a red cat left of a blue car")[0]',
            'frames[0].save("video.gif", save_all=True, append_images=frames[1:])',
        ]
    return [
        "```python",
        "from metacanvas_jax.torch_export import MetaCanvasPipeline",
        "",
        f'pipeline = MetaCanvasPipeline.from_pretrained("THIS-FOLDER"{arguments})',
        *draws,
        "```",
    ]


def _training(setup: Experiment) -> list[tuple[str, Any]]:
    train, optimizer = setup.train, setup.optimizer
    return [
        ("objective", setup.objective),
        ("steps", train.steps),
        (
            "batch",
            train.batch if train.accumulate == 1 else f"{train.batch}, {train.batch // train.accumulate} at once",
        ),
        ("learning rate", f"{optimizer.learning_rate:g}, {optimizer.schedule}, warm-up {optimizer.warmup_steps}"),
        ("trained", "; ".join(f"`{regex}` {action}" for regex, action in train.rules)),
        ("data", _data(setup)),
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
