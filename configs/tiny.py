"""The miniature of any experiment: the same parts, tasks and rules with networks so small that a CPU trains them.

What distinguishes an experiment stays: which sections there are, ablations, adapters, what trains, tasks and their
shares. What is replaced: sizes, weights (fresh ones), data and the length of the run. The data of ``miniature`` are
OpenMoji scenes, drawn here; those of ``emoji`` are the styles and clips of the npm packages below ``data/npm``.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base
from metacanvas_jax import registry
from metacanvas_jax.config import schema
from metacanvas_jax.config.sources import DRAWN, EMOJI, SourceSection
from metacanvas_jax.parallel.mesh import MeshConfig
from metacanvas_jax.sizes import nearest_size
from metacanvas_jax.vae.patch_pca.network import PatchPcaConfig
from metacanvas_jax.worlds.scenes import SceneWorld

CACHE = "runs/tiny"
SIZE = 60  # pixels along a side
SIZES = ((SIZE, SIZE), (48, 72), (72, 48))  # of a task that has buckets of several aspect ratios
FRAMES = 5
LENGTH = 160
OBJECTS = ("cat", "car", "tree", "house", "star", "heart", "mushroom", "duck")
GRID = 5  # patch tokens along a side, of every DiT


def shrink(config: ConfigDict, miniature: str) -> ConfigDict:
    """The miniature of a config, which is changed; ``miniature`` is a word of `base.MINIATURES`."""
    config.name = f"{config.name}_{miniature}"
    kind = config.dit.kind
    with config.ignore_type():
        config.world = base.section(SceneWorld(objects=OBJECTS))
        config.data.update({"path": f"{CACHE}/data", "count": 512})
        networks(config, kind)
        config.start = config.dit_weights = ""
        rows: Any = config.buckets
        config.buckets = together([{**bucket, **shape(bucket, rows)} for bucket in rows])
        if miniature == "emoji":
            config.vae_weights = f"{config.vae_weights}_emoji"
        kinds, path = (EMOJI, f"{base.DATA}/npm") if miniature == "emoji" else (DRAWN, "")
        serving = {task: kind for kind, tasks in kinds.items() for task in tasks}
        kept = 0.1 if miniature == "emoji" else 0.0  # for validation; of drawings another seed makes new ones
        config.sources = base.sources(
            *(
                SourceSection(serving[task], path, task, count=512, validation=kept)
                for task in dict.fromkeys(bucket["task"] for bucket in rows)
            )
        )
        config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 2, "warmup_from": 1e-4})
        config.train.update(
            {
                "steps": 20,
                "batch": 8,
                "frozen_dtype": "float32",
                "log_every": 1,
                "preview_every": 20,
                "evaluate_every": 20,
                "checkpoint_every": 20,
            }
        )
        config.sampler.update({"steps": 8})
        # As many results as previews draw, which then share their program.
        config.eval.update({"samples": 16, "during_training": 4})
        judged = miniature == "miniature" and all(bucket["size"] == (SIZE, SIZE) for bucket in config.buckets)
        config.eval.evaluators = ("tasks", "flow_loss") if judged else ("flow_loss",)
        config.mesh = base.section(MeshConfig())
        config.hardware = ()
    return config


def networks(config: ConfigDict, kind: str) -> None:
    """Tiny networks in place of the published ones; adapters get rank 4."""
    whole = {"dtype": "float32", "remat": "none"}
    lora, words = config.mllm.language.lora, (config.mllm.assistant, config.mllm.image_label)
    mllm = schema.MllmSection(
        **registry.family("mllm")[config.mllm.kind].tiny,
        tokenizer=f"{CACHE}/tokenizer",
        buckets=(LENGTH,),
        system=None,
        image_tokens=9,
        kind=config.mllm.kind,
        assistant=words[0],
        image_label=words[1],
    )
    config.mllm = base.section(mllm)
    if lora is not None:
        config.mllm.language.lora = dict(lora) | {"rank": 4, "alpha": 4.0}
    if config.get("text") is not None:
        record = registry.family("text")[config.text.kind]
        encoder = record.config(**record.tiny)
        text = schema.TextSection(
            encoder, tokenizer=f"{CACHE}/tokenizer", length=32, instruction=False, kind=record.name
        )
        config.text = base.section(text, reads_prompt=config.text.reads_prompt)
    dit = registry.family("dit")[kind]
    config.dit.update(dict(dit.tiny) | whole)
    if config.dit.get("lora") is not None:
        config.dit.lora.update({"rank": 4, "alpha": 4.0})
    channels = config.dit.latent_channels
    if config.dit.get("extra_channels"):
        config.dit.extra_channels = channels + 1
    patch = SIZE // (GRID * dit.module(dit.config(**dit.tiny)).patch[1])  # pixels per latent
    config.vae = base.section(PatchPcaConfig(patch=patch, channels=channels), kind="patch_pca")
    config.vae_weights = f"{CACHE}/vae_{patch}"
    if config.get("canvas") is not None:
        config.canvas.update({"rows": GRID, "columns": GRID})
        if config.canvas.get("latents_per_cell"):
            config.canvas.latents_per_cell = SIZE // patch // GRID
        tiny = {"vanilla_head_width": 32, "vanilla_ratio": 2.0, "mlp_ratio": 1.5, "dtype": "float32"}
        config.canvas_connector.update(tiny)
    if config.get("context_connector") is not None:
        skip = min(config.context_connector.skip, 3)  # without a system prompt: the opening of the user's turn
        config.context_connector.update({"hidden": None, "dtype": "float32", "skip": skip})
        if config.context_connector.kind == "identity":
            config.dit.context_width = config.mllm.language.width
    if config.get("queries") is not None:
        config.queries.count = 8


def together(rows: list[dict]) -> tuple[dict, ...]:
    """Buckets of one task, size and length as one, with the sum of their weights."""
    found: dict[tuple, dict] = {}
    for row in rows:
        key = row["task"], row["size"], row["length"]
        found[key] = {**row, "weight": row["weight"] + (found[key]["weight"] if key in found else 0.0)}
    return tuple(found.values())


def shape(bucket: dict, rows: tuple[dict, ...]) -> dict:
    """The miniature shape of one of the buckets ``rows``."""
    frames = 1 if bucket["frames"] == 1 else FRAMES
    several = sum(row["task"] == bucket["task"] for row in rows)
    return {
        "size": nearest_size(bucket["size"], SIZES if several > 1 else SIZES[:1]),
        "frames": frames,
        "fps": 4.0,
        "length": min(bucket["length"], LENGTH) if bucket["by_length"] else LENGTH,
        "batch": None,
        "references": min(bucket["references"], 2),
    }
