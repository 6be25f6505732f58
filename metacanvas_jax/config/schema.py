"""Every section of a config as a frozen dataclass. ``Experiment`` holds them all."""

import dataclasses
from typing import Any, Literal

from metacanvas_jax import registry
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.connectors.canvas import CanvasConnectorConfig
from metacanvas_jax.connectors.context import ContextConnectorConfig
from metacanvas_jax.connectors.queries import QueriesConfig
from metacanvas_jax.diffusion import schedules
from metacanvas_jax.diffusion.flow import TimeConfig
from metacanvas_jax.errors import UserError
from metacanvas_jax.hardware import slice_name
from metacanvas_jax.mllm.canvas import CanvasConfig
from metacanvas_jax.nn.layers import Dtype
from metacanvas_jax.parallel.mesh import MeshConfig
from metacanvas_jax.tasks import Bucket, any_length
from metacanvas_jax.worlds.scenes import SceneWorld


@dataclasses.dataclass(frozen=True)
class MllmSection:
    """The MLLM: its sizes, the folder of its weights (empty: random weights) and that of its tokenizer.

    ``buckets`` are the lengths that prompts are padded to. ``system`` is the system prompt. With ``assistant`` a prompt
    ends with the opening of the assistant's turn, else with the end of the user's. ``image_label`` is text before each
    image, where ``{}`` becomes its number from 1. An image, or a pair of video frames, becomes at most ``image_tokens``
    tokens (None: its pixels decide). The MLLM sees ``video_fps`` frames of each second of a video. ``context_cache`` is
    a folder that keeps the states of prompts, so that the MLLM reads each prompt once (empty: it reads the prompts in
    every step); up to ``context_memory`` GiB of them are kept in the memory of each process, also without a folder.
    ``kind`` names the network in the registry; ``language`` and ``vision`` (None: it reads text only) are the configs
    of its two halves.
    """

    language: Any
    vision: Any
    weights: str = ""
    tokenizer: str = ""
    buckets: tuple[int, ...] = (64, 128, 256, 512)
    system: str | None = "You are a helpful assistant."
    image_pixels: tuple[int, int] | None = None  # least and most pixels of an image; None: the published limits
    video_pixels: tuple[int, int] | None = None  # the same of a frame, or of a whole video where the MLLM counts so
    image_tokens: int | None = None
    video_fps: float = 2.0
    context_cache: str = ""
    context_memory: float = 0.0
    kind: str = next(iter(registry.family("mllm")))
    assistant: bool = False
    image_label: str = ""


@dataclasses.dataclass(frozen=True)
class TextSection:
    """The DiT's own text encoder, for a DiT that keeps it, and the text that it reads.

    ``kind`` is the name of the network in the registry, ``encoder`` its config. The DiT reads ``length`` states.
    ``instruction`` puts the published instruction of the DiT before the prompt; an encoder whose prompts have a wording
    of their own has no instruction, and that wording always. With ``reads_prompt`` False the text encoder always reads
    the empty prompt: only the canvas then tells the DiT what to draw (paper, Fig. 4).
    """

    encoder: Any
    weights: str = ""
    tokenizer: str = ""
    length: int = 300
    instruction: bool = True
    reads_prompt: bool = True
    kind: str = next(iter(registry.family("text")))


@dataclasses.dataclass(frozen=True)
class DataSection:
    """The folder of the data set and how it is read.

    ``path`` and ``count`` are those of scenes drawn from the world, which a config without sources trains on.
    ``picture_weight`` is the share of captioned OpenMoji pictures, from ``pictures_path``, among them. A share
    ``caption_dropout`` of the samples has the empty prompt: what the model learns on them is the other side of
    classifier-free guidance. A share ``canvas_dropout`` of the samples is drawn without a canvas. A run stops after
    ``max_skips`` corrupt records. Each process reads ``threads`` samples at the same time, and up to ``prefetch``
    batches ahead of the step.
    """

    path: str
    count: int = 20_000
    pictures_path: str = ""
    picture_weight: float = 0.0
    caption_dropout: float = 0.0
    canvas_dropout: float = 0.0
    threads: int = 2
    prefetch: int = 4
    in_memory: bool = True
    max_skips: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a share outside of [0, 1]."""
        for name in ("picture_weight", "caption_dropout", "canvas_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share between 0 and 1")


@dataclasses.dataclass(frozen=True)
class SamplerSection:
    """How images and videos are drawn: noise levels, numerical method and scale of classifier-free guidance.

    ``schedule`` is "dynamic", whose shift ``dynamic`` describes, or a name of ``registry.SCHEDULES``, which read
    ``shift``. ``method`` is a function of ``diffusion/samplers.py``. With ``rescale`` the guided velocity gets the norm
    of the velocity with the prompt, in every patch of latents.
    """

    schedule: str = "linear"
    method: Literal["euler", "dpmpp_2m", "unipc"] = "euler"
    steps: int = 24
    shift: float = 2.0
    guidance: float = 1.5
    dynamic: schedules.DynamicShift = dataclasses.field(default_factory=schedules.DynamicShift)
    rescale: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown schedule, or a shift that it cannot have."""
        if self.schedule not in (known := (*registry.SCHEDULES, "dynamic")):
            raise ValueError(f"schedule is {self.schedule!r}, expected one of {', '.join(map(repr, known))}")
        self.make(tokens=1)

    def make(self, tokens: int) -> schedules.Schedule:
        """The noise levels; ``tokens`` is the number of latent patch tokens, on which some schedules depend."""
        if self.schedule == "dynamic":
            return schedules.dynamic(self.steps, tokens, self.dynamic)
        return registry.SCHEDULES[self.schedule](self.steps, self.shift, tokens)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate. The defaults are those of AdamW, with the paper's clipping of the gradient norm.

    The warm-up is linear from ``warmup_from`` to ``learning_rate`` over ``warmup_steps``. The rate then stays
    ("constant"), or falls to ``final_fraction * learning_rate`` at ``total_steps`` ("cosine", "linear"). Weight decay
    acts on parameters whose whole path matches ``decay_rule``: the number of axes cannot tell kernels from gains, as
    gains of scanned layers have two.
    """

    learning_rate: float
    warmup_steps: int = 0
    warmup_from: float = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    total_steps: int | None = None
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_rule: str = "(.*/)?kernel"
    clip: float | None = 1.0

    def __post_init__(self):
        if self.schedule != "constant" and (self.total_steps is None or self.total_steps <= self.warmup_steps):
            raise UserError(
                f"optimizer.schedule {self.schedule!r} needs total_steps > warmup_steps ({self.warmup_steps}), "
                f"got {self.total_steps}"
            )
        if self.learning_rate <= 0 or self.warmup_from < 0 or self.warmup_steps < 0 or self.weight_decay < 0:
            raise UserError(
                "optimizer: learning_rate must be positive; warmup_from, warmup_steps and weight_decay not negative"
            )
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and 0 <= self.final_fraction <= 1):
            raise UserError("optimizer: b1 and b2 must lie in [0, 1), final_fraction in [0, 1]")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"optimizer.clip is {self.clip}, expected a positive norm or None")


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """What trains, for how long, and how often something is written.

    ``rules`` are pairs (regular expression, "train" or "freeze"). The first that matches the whole path of a parameter
    decides about it. ``steps`` of ``batch`` samples each are cut into ``accumulate`` parts to save memory.
    """

    steps: int
    batch: int
    rules: tuple[tuple[str, Literal["train", "freeze"]], ...]
    accumulate: int = 1
    ema: float | None = 0.99
    frozen_dtype: Dtype = "bfloat16"
    log_every: int = 20
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_every: int | None = None
    keep_best: int = 0  # checkpoints with the best scores, of those made every evaluate_every steps
    max_skips: int = 0  # batches of a run that may be skipped because their loss or gradient is not finite
    stall_s: float = 300.0  # seconds without progress after which a line says which process keeps the others waiting
    preview_every: int = 500
    evaluate_every: int = 0


EvaluatorName = Literal[
    "scenes",
    "tasks",
    "flow_loss",
    "prompts",
    "geneval",
    "gedit",
    "imgedit",
    "vbench",
    "vbench_i2v",
    "omnicontext",
    "dpg",
    "wise",
]
"""The names of ``evaluate/evaluators.py``."""


@dataclasses.dataclass(frozen=True)
class EvalSection:
    """What evaluates a run, in training every ``train.evaluate_every`` steps.

    ``evaluators`` are names of ``evaluate/evaluators.py``; the score of the first decides which checkpoints are best.
    Without names, "scenes" scores a run on its world and "flow_loss" any other. ``batch`` pictures are drawn at once,
    with the noise of ``seed``.

    "scenes" draws ``per_category`` prompts of the seen split and ``per_category_held_out`` of the other, in training
    only ``during_training`` seen ones. "tasks" draws ``samples`` drawings of every task, in training
    ``during_training``, and judges each exactly. "flow_loss" computes the loss of ``samples`` samples per task at each
    noise level of ``levels``. The samples of these two are not trained on: they come from ``sources``, where a config
    names some, else from what the sources of the training keep back (drawings: from another seed). "prompts" draws the
    file of prompts ``data``, and the benchmarks what ``data`` names, of it the first ``limit`` prompts (None: all),
    ``per_device`` results at once on each device.
    """

    per_category: int = 40
    per_category_held_out: int = 20
    during_training: int = 8
    batch: int = 60
    seed: int = 123
    evaluators: tuple[EvaluatorName, ...] = ()
    samples: int = 32
    levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    sources: tuple[SourceSection, ...] = ()
    data: str = ""
    limit: int | None = None
    per_device: int = 4

    def __post_init__(self) -> None:
        """Raises ValueError for a noise level outside of [0, 1], or none."""
        if not self.levels or not all(0 <= level <= 1 for level in self.levels):
            raise ValueError(f"levels is {self.levels}, expected noise levels between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A TPU slice that an experiment was planned for.

    ``topology`` names the slice as `metacanvas plan --topology` does. On it ``mesh`` ("data=4,fsdp=16") replaces the
    mesh of the config, and ``overrides`` ("--config.KEY=VALUE") change the config. ``pixels`` plans a step that encodes
    the pixels instead of reading stored latents. With ``kept`` False `make plan-all` leaves the slice out.
    """

    topology: str
    mesh: str = ""
    overrides: tuple[str, ...] = ()
    pixels: bool = False
    kept: bool = True

    def __post_init__(self) -> None:
        """Raises UserError for a topology that is no name of a slice."""
        slice_name(self.topology, key="topology")


@dataclasses.dataclass(frozen=True)
class PathsSection:
    """Folders, local or ``gs://``, that the relative paths of a config lie below (``config/paths.py``).

    ``weights`` moves the folders of weights and tokenizers, ``data`` those of data and stored contexts, ``runs`` the
    folder of the run and its ``start``. Empty: relative paths are those of this machine.
    """

    weights: str = ""
    data: str = ""
    runs: str = ""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides a run.

    The objective "paint" trains the velocity of the DiT, "understand" the next tokens of the MLLM alone. With
    ``recall`` n an MLLM also learns to predict, from each of its first ``recall_within`` states (None: from all), the
    last n tokens up to that state's own. With ``facts`` its first channels also learn to tell what is known of the
    scene at that token (``train/objectives.py``); this is the weight of that loss.

    ``dit_weights`` and ``vae_weights`` are folders of published weights. ``start`` is the folder of a run: its trained
    parameters are the initial ones of this run. ``dit_guidance`` is the guidance scale that a guidance-distilled DiT
    reads. Each step draws one of the ``buckets``; its samples come from the ``sources`` of the same task. Without
    sources, samples are scenes of the ``world``. ``mesh`` may name a ``preset`` of ``parallel/mesh.py`` and change its
    sizes. ``hardware`` are the slices that the experiment was planned for, the recommended one first.
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
    facts: float = 0.0
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
    hardware: tuple[Hardware, ...] = ()

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        """The buckets of the run, each with its batch."""
        world = Bucket("text_to_image", (self.world.size, self.world.size), length=max(self.mllm.buckets))
        buckets = self.buckets or (world,)
        return tuple(dataclasses.replace(b, batch=self.train.batch if b.batch is None else b.batch) for b in buckets)

    @property
    def drawn(self) -> tuple[Bucket, ...]:
        """The buckets in whose shapes results are drawn: of those that differ in length alone, the longest."""
        return any_length(self.shapes)

    def sizes_of(self, task: str) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of the buckets of a task whose sources are sorted by size; none where they are not."""
        sorted_ = any(source.by_size for source in self.sources if source.task == task)
        return tuple(bucket.size for bucket in self.drawn if bucket.task == task) if sorted_ else ()

    @property
    def uses_mllm(self) -> bool:
        """Whether any part reads the MLLM. A DiT with its own text encoder can run without one."""
        return any(part is not None for part in (self.canvas, self.queries, self.context_connector))

    @property
    def given_channels(self) -> bool:
        """Whether the DiT has input channels for given latents."""
        return bool(getattr(self.dit, "extra_channels", 0))
