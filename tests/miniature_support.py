"""The miniature's configs at a size that trains in seconds, with everything in one temporary folder."""

from pathlib import Path

from metacanvas_jax.config.load import load_config

SMALL = (
    "--config.data.count=64",
    "--config.train.batch=8",
    "--config.train.log_every=1",
    "--config.train.preview_every=0",
    "--config.train.checkpoint_every=2",
    "--config.optimizer.warmup_steps=1",
    "--config.mllm.language.width=32",
    "--config.mllm.language.layers=1",
    "--config.mllm.language.mlp=32",
    "--config.mllm.language.rope_sections=(1,1,2)",
    "--config.mllm.vision.depth=1",
    "--config.mllm.vision.width=16",
    "--config.mllm.vision.mlp=16",
    "--config.mllm.vision.out_width=32",
    "--config.mllm.vision.full_attention_layers=(0,)",
)
SMALL_PAINTER = (
    "--config.dit.layers=1",
    "--config.dit.heads=2",
    "--config.dit.context_width=32",
    "--config.dit.cross_heads=1",
    "--config.canvas_connector.width=64",
    "--config.context_connector.out_width=32",
    "--config.eval.per_category=1",
    "--config.eval.per_category_held_out=1",
    "--config.eval.batch=8",
    "--config.sampler.steps=2",
)


def arguments(folder: Path, variant: str, steps: int) -> tuple[str, list[str]]:
    """The config's name and the overrides that make it small."""
    places = [
        f"--config.data.path={folder}/data",
        f"--config.mllm.tokenizer={folder}/tokenizer",
        f"--config.mllm.weights={'' if variant == 'mllm' else f'{folder}/mllm/weights'}",
        f"--config.train.steps={steps}",
    ]
    if variant != "base":
        places.append(f"--config.optimizer.total_steps={max(steps, 2)}")
    # There are more facts than channels of so small an MLLM.
    painter = ["--config.facts=0.0"] if variant == "mllm" else [f"--config.vae_weights={folder}/vae", *SMALL_PAINTER]
    if variant in ("text", "base"):
        painter = [option for option in painter if "canvas_connector" not in option]
    return f"configs/miniature.py:{variant}", [*places, *SMALL, *painter]


def config(folder: Path, variant: str, steps: int = 4):
    """The small config itself."""
    name, overrides = arguments(folder, variant, steps)
    return load_config(name, overrides)
