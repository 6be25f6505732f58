"""From a ConfigDict to validated dataclasses, and from those to networks. ConfigDicts end here."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from metacanvas_jax.connectors.canvas import CanvasConnector, CanvasConnectorConfig
from metacanvas_jax.connectors.context import ContextConnector, ContextConnectorConfig
from metacanvas_jax.connectors.queries import Queries, QueriesConfig
from metacanvas_jax.data.sources import SourceSection
from metacanvas_jax.diffusion import schedules
from metacanvas_jax.diffusion.flow import TimeConfig
from metacanvas_jax.dit.flux.network import Flux, FluxConfig
from metacanvas_jax.dit.sana.network import Sana, SanaConfig
from metacanvas_jax.dit.wan.network import Wan, WanConfig
from metacanvas_jax.errors import UserError
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.mllm.canvas import CanvasConfig, CanvasTokens
from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig, Qwen25VL
from metacanvas_jax.mllm.qwen2_5_vl.vision import VisionConfig
from metacanvas_jax.parallel.mesh import PRESETS, MeshConfig
from metacanvas_jax.tasks import TASKS, Bucket
from metacanvas_jax.text.gemma2.network import Gemma2, Gemma2Config
from metacanvas_jax.train.optimizer import OptimizerConfig
from metacanvas_jax.types import Params
from metacanvas_jax.vae.dc_ae.network import DcAe, DcAeConfig
from metacanvas_jax.vae.kl.network import Kl, KlConfig
from metacanvas_jax.vae.patch_pca.network import PatchPca, PatchPcaConfig
from metacanvas_jax.vae.wan.network import WanVae, WanVaeConfig
from metacanvas_jax.worlds.scenes import SceneWorld

DITS: dict[str, tuple[type, type[nn.Module]]] = {
    "sana": (SanaConfig, Sana),
    "flux": (FluxConfig, Flux),
    "wan": (WanConfig, Wan),
}
VAES: dict[str, tuple[type, type[nn.Module]]] = {
    "patch_pca": (PatchPcaConfig, PatchPca),
    "dc_ae": (DcAeConfig, DcAe),
    "kl": (KlConfig, Kl),
    "wan": (WanVaeConfig, WanVae),
}


@dataclasses.dataclass(frozen=True)
class MllmSection:
    """The MLLM, the folder of its weights (empty: random) and of its tokenizer.

    ``image_tokens`` is how many tokens an image, or a pair of video frames, becomes at most (None: by its pixels);
    ``video_fps`` is how many frames of a video's second are read. ``context_cache`` is a folder in which what is made
    of a prompt is kept, so that a run reads each once (empty: every step reads its prompts).
    """

    language: LanguageConfig
    vision: VisionConfig | None
    weights: str = ""
    tokenizer: str = ""
    buckets: tuple[int, ...] = (64, 128, 256, 512)
    system: str | None = "You are a helpful assistant."
    image_pixels: tuple[int, int] | None = None  # least and most pixels of an image; None: the published limits
    image_tokens: int | None = None
    video_fps: float = 2.0
    context_cache: str = ""


@dataclasses.dataclass(frozen=True)
class TextSection:
    """The text encoder that a DiT keeps for itself (SANA's Gemma-2) and how it is prompted.

    The DiT reads ``length`` states. ``instruction`` puts SANA's before the prompt. With ``reads_prompt`` False it
    always gets the empty prompt, so that all meaning comes over the canvas (paper, Fig. 4).
    """

    encoder: Gemma2Config
    weights: str = ""
    tokenizer: str = ""
    length: int = 300
    instruction: bool = True
    reads_prompt: bool = True


@dataclasses.dataclass(frozen=True)
class DataSection:
    """Where the data set lies and how it is read."""

    path: str
    count: int = 20_000
    pictures_path: str = ""
    picture_weight: float = 0.0  # share of captioned OpenMoji pictures, the second source
    caption_dropout: float = 0.1
    threads: int = 2
    in_memory: bool = True
    max_skips: int = 0  # corrupt records to pass over before stopping


@dataclasses.dataclass(frozen=True)
class SamplerSection:
    """How pictures are drawn. ``schedule`` and ``method`` name functions of ``diffusion``."""

    schedule: Literal["linear", "sana_dpm", "wan_unipc", "flux_dynamic"] = "linear"
    method: Literal["euler", "dpmpp_2m", "unipc"] = "euler"
    steps: int = 24
    shift: float = 2.0
    guidance: float = 1.5

    def make(self, tokens: int) -> schedules.Schedule:
        """The noise levels; ``tokens`` is the number of latent tokens, which only FLUX's schedule asks for."""
        if self.schedule == "flux_dynamic":
            return schedules.flux_dynamic(self.steps, tokens)
        return getattr(schedules, self.schedule)(self.steps, self.shift)


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """Length and rhythm of a training. ``rules`` tell what trains: ordered (regex, "train" | "freeze")."""

    steps: int
    batch: int
    rules: tuple[tuple[str, str], ...]
    accumulate: int = 1
    ema: float | None = 0.99
    frozen_dtype: str = "bfloat16"
    log_every: int = 20
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_every: int | None = None
    keep_best: int = 0  # checkpoints with the best scores, of those made every evaluate_every steps
    max_skips: int = 0  # batches of a run that may be skipped because their loss or gradient is not finite
    stall_s: float = 300.0  # seconds without progress after which a line says which process keeps the others waiting
    preview_every: int = 500
    evaluate_every: int = 0


@dataclasses.dataclass(frozen=True)
class EvalSection:
    """How a run is scored: prompts per category and split, and the pictures drawn at once."""

    per_category: int = 40
    per_category_held_out: int = 20
    during_training: int = 8  # seen prompts per category, every train.evaluate_every steps
    batch: int = 60
    seed: int = 123


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides a run. ``objective`` is "paint" (the flow of the DiT) or "understand" (next tokens).

    ``start`` is the folder of a run whose trained parameters this one begins with; ``dit_weights`` that of
    published ones. ``recall`` is how many tokens, up to its own, each of the first ``recall_within`` states (None:
    of all) of an MLLM that is taught must tell. ``dit_guidance`` is the scale told to a guidance-distilled DiT. A
    step draws one of the ``buckets``, whose samples come from the ``sources`` of its task; without them the run
    paints the pictures of its world. ``mesh`` may name a ``preset`` of ``parallel/mesh.py`` and change it.
    """

    name: str
    seed: int
    objective: Literal["paint", "understand"]
    world: SceneWorld
    data: DataSection
    mllm: MllmSection
    optimizer: OptimizerConfig
    train: TrainSection
    dit: Any = None
    vae: Any = None
    vae_weights: str = ""
    dit_weights: str = ""
    dit_guidance: float | None = None
    start: str = ""
    recall: int = 0
    recall_within: int | None = None
    text: TextSection | None = None
    canvas: CanvasConfig | None = None
    canvas_connector: CanvasConnectorConfig | None = None
    context_connector: ContextConnectorConfig | None = None
    queries: QueriesConfig | None = None
    time: TimeConfig = dataclasses.field(default_factory=TimeConfig)
    sampler: SamplerSection = SamplerSection()
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalSection = EvalSection()
    buckets: tuple[Bucket, ...] = ()
    sources: tuple[SourceSection, ...] = ()

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        """The buckets of the run, each with its batch."""
        world = Bucket("text_to_image", (self.world.size, self.world.size), length=max(self.mllm.buckets))
        buckets = self.buckets or (world,)
        return tuple(dataclasses.replace(b, batch=self.train.batch if b.batch is None else b.batch) for b in buckets)

    @property
    def uses_mllm(self) -> bool:
        """Whether anything reads the MLLM; a DiT with its own text encoder may do without."""
        return any(part is not None for part in (self.canvas, self.queries, self.context_connector))

    @property
    def given_channels(self) -> bool:
        """Whether the DiT has input channels for given latents."""
        return bool(getattr(self.dit, "extra_channels", 0))


def experiment(config: ConfigDict) -> Experiment:
    """The validated form of a config. Raises UserError that names the key, what was found and what was expected."""
    values = config.to_dict()
    for section, table in (("dit", DITS), ("vae", VAES)):
        if values.get(section) is not None:
            values[section] = _chosen(values[section], table, section)
    if isinstance(values.get("mesh"), Mapping):
        values["mesh"] = _mesh(values["mesh"])
    built = _dataclass(Experiment, values, "")
    if built.objective == "paint":
        _check_painter(built)
    return built


def _check_painter(built: Experiment) -> None:
    missing = [name for name in ("dit", "vae") if getattr(built, name) is None]
    if built.context_connector is None and built.text is None:
        missing.append("context_connector")
    if missing:
        raise UserError(f"config: objective 'paint' needs the section {missing[0]!r}")
    if (built.canvas is None) != (built.canvas_connector is None):
        raise UserError("config: 'canvas' and 'canvas_connector' come together; one of them is None")
    if built.queries is not None and built.context_connector is None:
        raise UserError("config: 'queries' reach the DiT through the 'context_connector', which is None")
    vae = autoencoder(built)
    if built.given_channels and built.dit.extra_channels != vae.channels + 1:
        raise UserError(
            f"config: dit.extra_channels is {built.dit.extra_channels}, expected {vae.channels + 1}: the latent's "
            f"{vae.channels} channels and a mask"
        )
    for i, bucket in enumerate(built.shapes):
        check_bucket(built, bucket, f"config: buckets[{i}] ({bucket.task})")


def check_bucket(built: Experiment, bucket: Bucket, where: str) -> None:
    """Raises UserError, beginning with ``where``, for a shape or a task that the networks cannot have."""
    vae, patch, task = autoencoder(built), _module(built.dit, DITS).patch, TASKS[bucket.task]
    rows, columns = vae.spatial * patch[1], vae.spatial * patch[2]
    if bucket.size[0] % rows or bucket.size[1] % columns:
        raise UserError(f"{where}: {bucket.size} pixels are no multiples of {rows} x {columns} (latent and patch)")
    if (bucket.frames - 1) % vae.temporal:
        raise UserError(f"{where}: expected 1 + {vae.temporal} k frames, found {bucket.frames}")
    if bucket.frames > 1 and not isinstance(built.dit, WanConfig):
        raise UserError(f"{where}: this DiT makes images only")
    if task.vae == "source" and not built.given_channels and not isinstance(built.dit, FluxConfig):
        raise UserError(f"{where}: the DiT has no way to read a source; Wan needs dit.extra_channels")
    if task.mllm != "nothing" and built.uses_mllm and built.mllm.vision is None:
        raise UserError(f"{where}: the MLLM must see, but mllm.vision is None")


def network(config: Experiment) -> MetaCanvas | Qwen25VL:
    """The network of a config: MetaCanvas, or the MLLM alone where that is what trains."""
    mllm = MllmConfig(config.mllm.language, config.mllm.vision)
    if config.objective == "understand":
        return Qwen25VL(mllm)
    dit = _module(config.dit, DITS)
    width = config.mllm.language.width
    canvas = connector = None
    if config.canvas is not None:
        canvas = CanvasTokens(config.canvas, width, config.mllm.language.dtype)
        connector = CanvasConnector(config.canvas_connector)
    return MetaCanvas(
        dit=dit,
        mllm=Qwen25VL(mllm) if config.uses_mllm else None,
        context_connector=None if config.context_connector is None else ContextConnector(config.context_connector),
        canvas=canvas,
        canvas_connector=connector,
        queries=None if config.queries is None else Queries(config.queries, width, config.mllm.language.dtype),
        text=None if config.text is None else Gemma2(config.text.encoder, config.text.length),
    )


def autoencoder(config: Experiment) -> nn.Module:
    """The autoencoder of a config."""
    return _module(config.vae, VAES)


def parameter_count(params: Params) -> int:
    """Number of values in a tree of arrays or abstract shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _module(config: Any, table: dict[str, tuple[type, type[nn.Module]]]) -> nn.Module:
    return next(module for cls, module in table.values() if isinstance(config, cls))(config)


def _chosen(values: Mapping[str, Any], table: dict[str, tuple[type, type]], section: str) -> Any:
    kind = values.get("kind")
    if kind not in table:
        raise UserError(f"config: {section}.kind is {kind!r}, expected one of {', '.join(map(repr, table))}")
    rest = {key: value for key, value in values.items() if key != "kind"}
    return _dataclass(table[kind][0], rest, f"{section}.")


def _mesh(values: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``mesh``: an optional ``preset``, and sizes that differ from it."""
    preset = values.get("preset", "data")
    if preset not in PRESETS:
        raise UserError(f"config: mesh.preset is {preset!r}, expected one of {', '.join(map(repr, PRESETS))}")
    return dataclasses.asdict(PRESETS[preset]) | {key: value for key, value in values.items() if key != "preset"}


def _dataclass(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise UserError(f"config: unknown key {prefix}{key}; {hint}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"config: missing key {prefix}{name}")
    hints = typing.get_type_hints(cls)
    built = {key: _value(hints[key], value, prefix + key) for key, value in values.items()}
    try:
        return cls(**built)
    except ValueError as error:
        raise UserError(f"config: {prefix.rstrip('.') or 'top level'}: {error}") from error


def _value(hint: Any, value: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, key)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _dataclass(hint, value, key + ".")
    if origin is tuple and isinstance(value, list | tuple):
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(value):
            raise UserError(f"config: {key} has {len(value)} entries, expected {len(inner)}")
        return tuple(_value(a, v, f"{key}[{i}]") for i, (a, v) in enumerate(zip(inner, value, strict=True)))
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"config: {key} is {value!r}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is not Any and isinstance(hint, type) and not isinstance(value, hint):
        raise UserError(f"config: {key} is {value!r} ({type(value).__name__}), expected {hint.__name__}")
    return value
