"""Published folders with random weights, and the folder of an export: what ``gpu_full.py`` trains from.

Nothing is downloaded. Names, shapes and dtypes of the tensors and the keys of ``config.json`` are the published ones,
so that the import that reads them is the import that reads the real folders.
"""

import concurrent.futures
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gpu_full_cases import Case, setup_of

from metacanvas_jax import registry
from metacanvas_jax.config.networks import mllm_config
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.tokenizer import train_tokenizer
from metacanvas_jax.exchange import export_run as exports
from metacanvas_jax.exchange import parts as layout
from metacanvas_jax.text.gemma2.network import Gemma2Config
from metacanvas_jax.train.parameters import param_shapes
from metacanvas_jax.trees import flat, nested, partition
from metacanvas_jax.vae.dc_ae.network import DcAeConfig
from metacanvas_jax.vae.kl.network import KlConfig
from metacanvas_jax.vae.wan.network import WanVaeConfig
from metacanvas_jax.weights.hf_export import new_folder
from metacanvas_jax.weights.safetensors_io import write_file
from metacanvas_jax.weights.table import published_shapes

SHARD = 1e9  # bytes of a file: many files are written at once
POOL = 16_777_259  # random numbers that tensors are cut from: a prime, so that the rows of a matrix differ
WORDS = ("a red cat and a blue car on green grass; make the cat yellow",)
BF16 = np.dtype(ml_dtypes.bfloat16)


def write_folders(case: Case, folders: Path, small: bool) -> float:
    """Writes what a case reads and is not there yet; returns the GB that were written.

    Where the disk has no room, folders that other cases read are removed first; their stages write them again.
    """
    setup = setup_of(case, folders, small)
    pipeline, mllm, export = folders / case.folder, mllm_config(setup), export_folder(case, folders)
    tokenizers = [folder for folder in (setup.mllm.tokenizer, setup.text and setup.text.tokenizer) if folder]
    networks = {"mllm": (Path(setup.mllm.weights), mllm)}
    networks |= {"dit": (pipeline / "transformer", setup.dit), "vae": (pipeline / "vae", setup.vae)}
    if setup.text is not None:
        networks["text"] = pipeline / "text_encoder", setup.text.encoder
    missing = {part: found for part, found in networks.items() if not found[0].exists()}
    if not missing and export.exists():
        return 0.0
    shapes, vocabulary = param_shapes(setup), train_tokenizer(WORDS)
    needed = sum(BF16.itemsize * math.prod(leaf.shape) for part in missing for leaf in flat(shapes[part]).values())
    make_room(folders, needed, {pipeline, Path(setup.mllm.weights), export})
    for part, (folder, config) in missing.items():
        described = described_as(config, vocabulary.get_vocab())
        write_published(folder, registry.of(config), config, shapes[part], described)
    for folder in tokenizers:
        vocabulary.save_pretrained(folder)
    if not export.exists():
        write_export(setup, export)
    return needed / 1e9


def make_room(folders: Path, needed: float, used: set[Path]) -> None:
    """Removes folders that are not ``used``, the oldest first, until there is room for so many bytes."""
    folders.mkdir(parents=True, exist_ok=True)
    others = sorted((path for path in folders.iterdir() if path not in used), key=lambda path: path.stat().st_mtime)
    while others and shutil.disk_usage(folders).free < 1.1 * needed:
        shutil.rmtree(others.pop(0))


def described_as(config: Any, tokens: dict[str, int]) -> dict[str, Any]:
    """The ``config.json`` of a network."""
    network = registry.of(config)
    if network.family == "mllm":
        return network.write(config, tokens)
    if network.family == "text":
        return gemma_json(config)
    return network.write(config) if network.write is not None else vae_json(config)


def write_published(folder: Path, network: Any, config: Any, abstract: Any, described: dict[str, Any]) -> None:
    """One network in its published layout, in bfloat16."""
    table, leaves = network.table(config), flat(abstract)
    held = nested({entry.path: leaves[entry.path] for entry in table})
    shapes = published_shapes(table, held)
    stem = "model" if network.family in ("mllm", "text") else layout.DIFFUSERS_STEM
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and nbytes(shards[-1]) + nbytes({name: shape}) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    many = len(shards)
    names = [
        f"{stem}-{i:05}-of-{many:05}.safetensors" if many > 1 else f"{stem}.safetensors" for i in range(1, many + 1)
    ]

    def write(draft: Path, name: str, shard: dict[str, tuple[int, ...]]) -> None:
        values = (random_tensor(tensor, shape) for tensor, shape in shard.items())
        write_file(draft / name, {tensor: (BF16, shape) for tensor, shape in shard.items()}, values, {"format": "pt"})

    with new_folder(folder, nbytes(shapes)) as draft, concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(functools.partial(write, draft), names, shards))
        (draft / "config.json").write_text(json.dumps(described, indent=2))
        if many > 1:
            where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": nbytes(shapes)}, "weight_map": where}
            (draft / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def nbytes(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values()) * BF16.itemsize


@functools.lru_cache(maxsize=32)
def pool(inputs: int) -> np.ndarray:
    """Random bfloat16 numbers that keep the size of activations, for layers with so many inputs."""
    return (np.random.default_rng(0).standard_normal(POOL, np.float32) * inputs**-0.5).astype(BF16)


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Gains are 1 and biases 0; matrices and kernels are random."""
    if math.prod(shape) == shape[0]:
        return np.full(shape, 0.0 if name.endswith("bias") else 1.0, BF16)
    return np.resize(pool(math.prod(shape[1:])), shape)


def vae_json(config: Any) -> dict[str, Any]:
    """The ``config.json`` of an autoencoder, with the keys that diffusers writes."""
    if isinstance(config, DcAeConfig):
        attends = [i >= config.attention_from for i in range(len(config.channels))]
        blocks = ["EfficientViTBlock" if yes else "ResBlock" for yes in attends]
        scales = [[config.window] if yes else [] for yes in attends]
        sides = {
            f"{side}_{key}": value
            for side in ("encoder", "decoder")
            for key, value in (("block_types", blocks), ("qkv_multiscales", scales))
        }
        return sides | {
            "_class_name": "AutoencoderDC",
            "attention_head_dim": config.head_width,
            "decoder_block_out_channels": config.channels,
            "decoder_layers_per_block": config.decoder_blocks,
            "downsample_block_type": "conv",
            "encoder_block_out_channels": config.channels,
            "encoder_layers_per_block": config.encoder_blocks,
            "latent_channels": config.latent_channels,
            "scaling_factor": config.scale,
            "upsample_block_type": "interpolate",
        }
    if isinstance(config, KlConfig):
        stages = len(config.channels)
        return {
            "_class_name": "AutoencoderKL",
            "block_out_channels": config.channels,
            "down_block_types": ["DownEncoderBlock2D"] * stages,
            "latent_channels": config.latent_channels,
            "layers_per_block": config.blocks,
            "norm_num_groups": config.groups,
            "scaling_factor": config.scale,
            "shift_factor": config.shift,
            "up_block_types": ["UpDecoderBlock2D"] * stages,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        }
    assert isinstance(config, WanVaeConfig)
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config.encoder_width,
        "decoder_base_dim": config.decoder_width,
        "dim_mult": config.multipliers,
        "in_channels": 12,
        "is_residual": True,
        "latents_mean": config.latent_mean,
        "latents_std": config.latent_std,
        "num_res_blocks": config.blocks,
        "out_channels": 12,
        "patch_size": 2,
        "temperal_downsample": config.halve_time,
        "z_dim": len(config.latent_mean),
    }


def gemma_json(config: Gemma2Config) -> dict[str, Any]:
    """The ``config.json`` of Gemma-2, with the keys that transformers writes."""
    return {
        "architectures": ["Gemma2Model"],
        "model_type": "gemma2",
        "attn_logit_softcapping": config.softcap,
        "head_dim": config.head_width,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "query_pre_attn_scalar": int(config.query_scalar),
        "rope_theta": config.theta,
        "rms_norm_eps": config.eps,
        "sliding_window": config.window,
        "vocab_size": config.vocab,
    }


def export_folder(case: Case, folders: Path) -> Path:
    return folders / f"export_{case.name}"


def write_export(setup: Experiment, to: Path) -> None:
    """What `metacanvas export` would write of a run before its first step, but the transformer: the base has that."""
    trained = flat(partition(param_shapes(setup), setup.train.rules)[0])
    whole = (layout.TRANSFORMER, layout.TRANSFORMER_PARTIAL)
    found = [part for part in layout.parts(setup, list(trained)) if part.folder not in whole]
    known, rng, options = (
        flat(param_shapes(setup)),
        np.random.default_rng(0),
        exports.Options("bfloat16", progress=False),
    )
    with new_folder(to) as draft:
        for part in found:
            leaves = {path: 0.02 * rng.standard_normal(known[path].shape, np.float32) for path in part.paths}
            config = exports.write_weights(draft, part, leaves, setup, options)
            if part.folder == layout.MLLM_LORA:
                adapters = exports.peft_config(part, config, exports.lora.PEFT)
                (draft / part.folder / "adapter_config.json").write_text(json.dumps(adapters))
        connector = exports.connector_config(setup)
        (draft / layout.CONNECTOR / "config.json").write_text(json.dumps(connector))
        index = exports.make_index(setup, found, {"step": 0, "ema": False, "dtype": options.dtype})
        (draft / exports.INDEX).write_text(json.dumps(index))
