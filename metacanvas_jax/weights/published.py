"""Published model folders: which network a folder of transformers or diffusers holds, and its weights.

``config.json`` is read before any weight, so that a folder of another model costs nothing and is named as what it is.
A pipeline folder of diffusers (one with ``model_index.json``) stands for the subfolder that is asked for.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from metacanvas_jax.dit.flux import table as flux
from metacanvas_jax.dit.flux.network import FluxConfig
from metacanvas_jax.dit.sana import table as sana
from metacanvas_jax.dit.sana.network import SanaConfig
from metacanvas_jax.dit.wan import table as wan
from metacanvas_jax.dit.wan.network import WanConfig
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.qwen2_5_vl import table as qwen2_5_vl
from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig
from metacanvas_jax.mllm.qwen2_5_vl.vision import VisionConfig
from metacanvas_jax.text.gemma2 import table as gemma2
from metacanvas_jax.text.gemma2.network import Gemma2Config
from metacanvas_jax.types import Params
from metacanvas_jax.vae.dc_ae import table as dc_ae
from metacanvas_jax.vae.dc_ae.network import DcAeConfig
from metacanvas_jax.vae.kl import table as kl
from metacanvas_jax.vae.kl.network import KlConfig
from metacanvas_jax.vae.wan import table as wan_vae
from metacanvas_jax.vae.wan.network import PATCH, WanVaeConfig
from metacanvas_jax.weights import hf_import
from metacanvas_jax.weights.table import Entry

# What a config may decide for itself beside the published sizes.
OURS = (
    *("dtype", "remat", "offload", "lora", "pooled", "mask_context", "extra_channels", "chunk", "time_scale"),
    *("caption_norm_init", "zero_init_out"),
)
_REQUIRED = object()


class Fields:
    """The values of a ``config.json``, asked for by name."""

    def __init__(self, file: Path, values: Mapping[str, Any]):
        self.file, self.values = file, values

    def __call__(self, name: str, default: Any = _REQUIRED) -> Any:
        """A value. Raises UserError for one that is missing and has no default."""
        if default is _REQUIRED and name not in self.values:
            raise UserError(f"{self.file}: {name} is missing")
        return self.values.get(name, default)

    def inside(self, name: str) -> "Fields":
        """The values of a nested object. Raises UserError if there is none."""
        value = self(name)
        if not isinstance(value, Mapping):
            raise UserError(f"{self.file}: {name} is {value!r}, expected an object")
        return Fields(self.file, value)

    def each(self, name: str, count: int) -> list[Any]:
        """A value for every stage, given once or as a list."""
        value = self(name)
        return list(value) if isinstance(value, list | tuple) else [value] * count

    def only(self, **expected: Any) -> None:
        """Raises UserError where the file asks for something this project does not build; absent values pass."""
        for name, value in expected.items():
            found = self.values.get(name, value)
            if found != value:
                raise UserError(f"{self.file}: {name} is {found!r}; only {value!r} is built here")


def subfolder(folder: str | Path, name: str) -> Path:
    """``folder/name`` for a pipeline folder of diffusers, else the folder itself. Raises UserError if it is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not (folder / "model_index.json").is_file():
        return folder
    if not (folder / name).is_dir():
        have = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
        raise UserError(f"{folder}: a pipeline without the subfolder {name}; it has {have}")
    return folder / name


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises UserError for a file that is missing or something else."""
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; expected a model folder of transformers or diffusers") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object")
    return values


def _sana(f: Fields) -> SanaConfig:
    width = f("num_attention_heads") * f("attention_head_dim")
    f.only(attention_bias=False, norm_elementwise_affine=False, guidance_embeds=False, timestep_scale=1.0)
    f.only(out_channels=f("in_channels"), cross_attention_dim=width)
    norms = {None: None, "rms_norm_across_heads": "across_heads"}
    if f("qk_norm", None) not in norms:
        f.only(qk_norm="rms_norm_across_heads")
    return SanaConfig(
        latent_channels=f("in_channels"),
        heads=f("num_attention_heads"),
        head_width=f("attention_head_dim"),
        cross_heads=f("num_cross_attention_heads"),
        layers=f("num_layers"),
        context_width=f("caption_channels"),
        mlp_ratio=float(f("mlp_ratio", 2.5)),
        patch=f("patch_size", 1),
        qk_norm=norms[f("qk_norm", None)],
        interpolation_scale=f("interpolation_scale", None),
        sample_size=f("sample_size", 32),
        eps=float(f("norm_eps", 1e-6)),
    )


def _flux(f: Fields) -> FluxConfig:
    f.only(patch_size=1)
    if f("out_channels", None) is not None:
        f.only(out_channels=f("in_channels"))
    return FluxConfig(
        latent_channels=f("in_channels") // 4,
        layers_double=f("num_layers"),
        layers_single=f("num_single_layers"),
        heads=f("num_attention_heads"),
        head_width=f("attention_head_dim"),
        context_width=f("joint_attention_dim"),
        pooled_width=f("pooled_projection_dim"),
        guidance=f("guidance_embeds", False),
        rope_axes=tuple(f("axes_dims_rope", (16, 56, 56))),
    )


def _wan(f: Fields) -> WanConfig:
    f.only(image_dim=None, added_kv_proj_dim=None, pos_embed_seq_len=None, qk_norm="rms_norm_across_heads")
    f.only(in_channels=f("out_channels"))
    return WanConfig(
        latent_channels=f("out_channels"),
        heads=f("num_attention_heads"),
        head_width=f("attention_head_dim"),
        mlp=f("ffn_dim"),
        layers=f("num_layers"),
        context_width=f("text_dim"),
        freq=f("freq_dim"),
        patch=tuple(f("patch_size")),
        cross_norm=f("cross_attn_norm"),
        eps=float(f("eps", 1e-6)),
    )


def _dc_ae(f: Fields) -> DcAeConfig:
    stages = len(f("encoder_block_out_channels"))
    types = f.each("encoder_block_types", stages)
    attention_from = types.count("ResBlock")
    scales = [list(scale) for scale in f("encoder_qkv_multiscales")]
    windows = {scale[0] for scale in scales[attention_from:] if len(scale) == 1}
    if len(windows) > 1 or any(len(scale) != int(i >= attention_from) for i, scale in enumerate(scales)):
        raise UserError(f"{f.file}: encoder_qkv_multiscales {scales} is not built here: one size, in attention stages")
    wanted = ["ResBlock"] * attention_from + ["EfficientViTBlock"] * (stages - attention_from)
    for name, expected in (
        ("encoder_block_types", wanted),
        ("decoder_block_types", wanted),
        ("decoder_norm_types", ["rms_norm"] * stages),
        ("decoder_act_fns", ["silu"] * stages),
    ):
        if f.values.get(name) is not None and f.each(name, stages) != expected:
            raise UserError(f"{f.file}: {name} is {f(name)!r}; only {expected!r} is built here")
    f.only(decoder_block_out_channels=f("encoder_block_out_channels"), decoder_qkv_multiscales=scales)
    f.only(encoder_out_shortcut=True, decoder_in_shortcut=True, decoder_conv_act_fn="relu", in_channels=3)
    f.only(upsample_block_type="interpolate")
    if f("downsample_block_type") == "pixel_unshuffle":
        f.only(downsample_block_type="conv")
    return DcAeConfig(
        channels=tuple(f("encoder_block_out_channels")),
        encoder_blocks=tuple(f("encoder_layers_per_block")),
        decoder_blocks=tuple(f("decoder_layers_per_block")),
        attention_from=attention_from,
        latent_channels=f("latent_channels"),
        head_width=f("attention_head_dim"),
        scale=float(f("scaling_factor")),
        window=windows.pop() if windows else 5,
    )


def _kl(f: Fields) -> KlConfig:
    f.only(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=True, act_fn="silu")
    f.only(in_channels=3, out_channels=3)
    return KlConfig(
        channels=tuple(f("block_out_channels")),
        blocks=f("layers_per_block"),
        latent_channels=f("latent_channels"),
        groups=f("norm_num_groups"),
        scale=float(f("scaling_factor")),
        shift=float(f("shift_factor", None) or 0.0),
    )


def _wan_vae(f: Fields) -> WanVaeConfig:
    f.only(is_residual=True, patch_size=PATCH, attn_scales=[])
    return WanVaeConfig(
        encoder_width=f("base_dim"),
        decoder_width=f("decoder_base_dim"),
        multipliers=tuple(f("dim_mult")),
        blocks=f("num_res_blocks"),
        halve_time=tuple(f("temperal_downsample")),
        latent_mean=tuple(map(float, f("latents_mean"))),
        latent_std=tuple(map(float, f("latents_std"))),
    )


def _gemma2(f: Fields) -> Gemma2Config:
    return Gemma2Config(
        vocab=f("vocab_size"),
        width=f("hidden_size"),
        layers=f("num_hidden_layers"),
        heads=f("num_attention_heads"),
        kv_heads=f("num_key_value_heads"),
        head_width=f("head_dim"),
        mlp=f("intermediate_size"),
        query_scalar=float(f("query_pre_attn_scalar")),
        softcap=float(f("attn_logit_softcapping")),
        window=f("sliding_window"),
        theta=float(_rope(f)("rope_theta", 10000.0)),
        eps=float(f("rms_norm_eps", 1e-6)),
    )


def _rope(f: Fields) -> Fields:
    """Where the rotary parameters lie: of their own in transformers 5, spread over two places before."""
    if f("rope_parameters", None):
        return f.inside("rope_parameters")
    return Fields(f.file, {**f.values, **(f("rope_scaling", None) or {})})


def _qwen(f: Fields) -> MllmConfig:
    text = f.inside("text_config") if "text_config" in f.values else f
    vision, rope = f.inside("vision_config"), _rope(text)
    language = LanguageConfig(
        vocab=text("vocab_size"),
        width=text("hidden_size"),
        layers=text("num_hidden_layers"),
        heads=text("num_attention_heads"),
        kv_heads=text("num_key_value_heads"),
        mlp=text("intermediate_size"),
        rope_sections=tuple(rope("mrope_section")),
        rope_theta=float(rope("rope_theta", 1e6)),
        norm_eps=float(text("rms_norm_eps", 1e-6)),
        tied=f("tie_word_embeddings", text("tie_word_embeddings", False)),
    )
    tower = VisionConfig(
        depth=vision("depth"),
        width=vision("hidden_size"),
        heads=vision("num_heads"),
        mlp=vision("intermediate_size"),
        out_width=vision("out_hidden_size"),
        full_attention_layers=tuple(vision("fullatt_block_indexes")),
        patch=vision("patch_size", 14),
        temporal_patch=vision("temporal_patch_size", 2),
        merge=vision("spatial_merge_size", 2),
        window=vision("window_size", 112),
        in_channels=vision("in_chans", vision("in_channels", 3)),
    )
    return MllmConfig(language, tower)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A published class: how its file is read, and the weight table of the config that comes of it."""

    read: Callable[[Fields], Any]
    config: type
    table: Callable[[Any], Sequence[Entry]]
    ignore: tuple[str, ...] = ()  # published tensors that no network here has


KINDS: dict[str, Kind] = {
    "SanaTransformer2DModel": Kind(_sana, SanaConfig, sana.table),
    "FluxTransformer2DModel": Kind(_flux, FluxConfig, flux.table),
    "WanTransformer3DModel": Kind(_wan, WanConfig, wan.table),
    "AutoencoderDC": Kind(_dc_ae, DcAeConfig, dc_ae.table),
    "AutoencoderKL": Kind(_kl, KlConfig, kl.table),
    "AutoencoderKLWan": Kind(_wan_vae, WanVaeConfig, wan_vae.table),
    "gemma2": Kind(_gemma2, Gemma2Config, gemma2.table, ("lm_head.*",)),
    "qwen2_5_vl": Kind(_qwen, MllmConfig, qwen2_5_vl.table),
}
"""By the class name of diffusers or the model type of transformers."""


def network_config(folder: str | Path, *kinds: type) -> Any:
    """The config of the network in a folder; ``kinds`` are the config classes that will do (any unless given).

    Raises UserError for a folder of another model, or for a variant of one that is not built here.
    """
    file = Path(folder) / "config.json"
    values = read_json(file)
    name = values.get("_class_name") or values.get("model_type")
    wanted = [name for name, kind in KINDS.items() if not kinds or kind.config in kinds]
    if name not in wanted:
        raise UserError(f"{file}: the model is {name or 'not named'}, expected {' or '.join(wanted)}")
    try:
        return KINDS[name].read(Fields(file, values))
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: not a {name} that can be built ({str(error).splitlines()[0]})") from error


def check_folder(folder: str | Path, config: Any, key: str) -> None:
    """Raises UserError naming the first size in which the folder's network differs from ``config``.

    ``key`` is the name of ``config`` in messages. What a config decides for itself (``OURS``) is not compared.
    """
    theirs, ours = _sizes(network_config(folder, type(config))), _sizes(config)
    for name in ours:
        if theirs[name] != ours[name]:
            file = Path(folder) / "config.json"
            raise UserError(f"{file}: {name} is {theirs[name]}, the config's {key}.{name} is {ours[name]}")


def _sizes(config: Any) -> dict[str, Any]:
    """What two configs of one published network have in common, by dotted name."""
    sizes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and field.name not in OURS:
            sizes |= {f"{field.name}.{name}": size for name, size in _sizes(value).items()}
        elif field.name not in OURS:
            sizes[field.name] = value
    if isinstance(config, LanguageConfig):
        sizes["head_width"] = config.head_channels
    if isinstance(config, SanaConfig) and config.interpolation_scale is None:
        del sizes["sample_size"]  # it scales positions, of which there are none
    if isinstance(config, MllmConfig) and config.vision is None:
        del sizes["vision"]
    return sizes


def load(folder: str | Path, config: Any, abstract: Mapping[str, Any], key: str, **options: Any) -> Params:
    """The parameters of a network that a folder has, checked by ``check_folder`` first.

    ``abstract`` are the shapes of its parameters, or of a part of them (see ``hf_import.load_params``, which takes
    ``options``). Parameters that are not published (adapters, new input channels) are left out of the result.
    """
    check_folder(folder, config, key)
    kind = next(kind for kind in KINDS.values() if kind.config is type(config))
    table, ignore = kind.table(config), kind.ignore
    if isinstance(config, MllmConfig) and config.vision is None:
        ignore = (*ignore, "visual.*", "model.visual.*")
    targets, known = flatten_dict(dict(abstract), sep="/"), {entry.path for entry in table}
    held = unflatten_dict({path: leaf for path, leaf in targets.items() if path in known}, sep="/")
    unread = [name for e in table if e.path not in targets for layer in e.tensors for name in e.names(layer)]
    table = [entry for entry in table if entry.path in targets]
    return hf_import.load_params(folder, table, held, ignore=(*ignore, *unread), **options)


def sampling(folder: str | Path) -> tuple[str, str, float]:
    """Schedule, method and shift (names of ``diffusion``) of a pipeline's scheduler.

    Raises UserError for a scheduler that is not rebuilt here.
    """
    file = subfolder(folder, "scheduler") / "scheduler_config.json"
    f = Fields(file, read_json(file))
    name = f("_class_name")
    if name == "FlowMatchEulerDiscreteScheduler" and f("use_dynamic_shifting", False):
        f.only(base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
        return "flux_dynamic", "euler", 1.0
    methods = {
        "DPMSolverMultistepScheduler": ("sana_dpm", "dpmpp_2m"),
        "UniPCMultistepScheduler": ("wan_unipc", "unipc"),
    }
    if name not in methods:
        raise UserError(f"{file}: the scheduler is {name}, expected {' or '.join(methods)} with flow sigmas")
    f.only(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
    return (*methods[name], float(f("flow_shift", 1.0)))
