"""A trained run as one folder for PyTorch: connectors, adapters, transformer, an index and a model card.

Parameters stream from the checkpoint a few at a time, so that a host without accelerator exports what a pod trained.
The folder appears when everything in it is written.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metacanvas_jax import files, registry
from metacanvas_jax.config.identity import identity
from metacanvas_jax.config.load import read_config, shared
from metacanvas_jax.config.networks import autoencoder, mllm_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.config.schema import Experiment, TextSection
from metacanvas_jax.config.weights import folders
from metacanvas_jax.data.inputs import prompter
from metacanvas_jax.data.shapes import latent_grid
from metacanvas_jax.data.tokenizer import load_tokenizer, save_tokenizer
from metacanvas_jax.errors import UserError
from metacanvas_jax.exchange import parts as layout
from metacanvas_jax.exchange.model_card import model_card
from metacanvas_jax.exchange.parts import Part
from metacanvas_jax.exchange.reading import computed, reading
from metacanvas_jax.mllm.template import CHAT
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.paint import placing, runs
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.text.prompts import INSTRUCTION
from metacanvas_jax.train import agreement, store
from metacanvas_jax.train.metrics import read_scores
from metacanvas_jax.train.parameters import identities, param_shapes, without_lost_start
from metacanvas_jax.train.stream import lazy_params
from metacanvas_jax.trees import flat, nested, partition
from metacanvas_jax.types import Params
from metacanvas_jax.weights import lora, saved
from metacanvas_jax.weights.hf_export import new_folder, save_params
from metacanvas_jax.weights.safetensors_io import write_file

INDEX, VERSION = "metacanvas.json", 1
RUN_CONFIG = "run_config.json"
DTYPES = ("float32", "bfloat16", "float16")
GATE_NOTE = """# Adapters of the MLLM

PEFT format. They were trained on canvas tokens only: while the model reads a prompt they must be off, or it no longer
understands as the base does, and the plan is not the one that was trained. With PEFT:

    with model.disable_adapter():
        prefix = model(**prompt, use_cache=True)
    canvas = model(inputs_embeds=..., position_ids=..., past_key_values=prefix.past_key_values)  # adapters on

`metacanvas_jax.torch_export` does this by itself; its switch is `pipeline.mllm.gate`: "canvas" (as trained),
"everywhere" (as PEFT would by default) or "nowhere".
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What of a run to export, and how. ``ema`` None: the moving average where the run kept one.

    With ``verify``, frozen weights that are there are compared whole with those of the training.

    Raises UserError for a dtype that is none of ``DTYPES`` or shards of no size.
    """

    dtype: str = "float32"
    ema: bool | None = None
    step: int | None = None
    shard_bytes: float = 5e9
    progress: bool = True
    verify: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.shard_bytes <= 0:
            raise UserError(f"a shard of {self.shard_bytes} bytes holds nothing")


def export_run(run: str | os.PathLike, to: str | os.PathLike, options: Options = Options()) -> Path:
    """Writes the newest checkpoint of a run (or that of ``options.step``) to a new folder.

    Raises:
        UserError: no run, no checkpoint, one of another config or damaged; a folder that has contents; a full disk; a
            parameter that trained and has no place in an export; weights of the project's own, or a run that this
            one starts from, that are missing.
    """
    run, to = files.folder(run), files.folder(to)
    config = read_config(run)
    setup = experiment(config)
    abstract = param_shapes(setup)
    trainable, frozen = partition(abstract, setup.train.rules)
    ema = setup.train.ema is not None if options.ema is None else options.ema
    with store.Store(run / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.steps()[-1] if options.step is None and checkpoints.steps() else options.step
        meta = checkpoints.meta(step)
        now = store.describe(identity(setup))["config"]
        # Of what a training must agree on, an export asks for the networks alone.
        saved = meta | {"config": {key: value for key, value in meta["config"].items() if key in now}}
        where = str(run / "checkpoints" / str(step))
        agreement.check_same(saved, meta | {"config": now}, where)
        there = identities(setup, whole=options.verify, there=True)
        agreement.check_known(meta["frozen"], there, folders(setup), where)
        trained = layout.parts(setup, list(flat(trainable)))
        made = layout.fresh(setup, trained)
        order = [entry.path for part in trained for entry in part.table]
        leaves = flat(lazy_params(checkpoints, trainable, ema=ema, step=step, order=order))
        leaves |= _frozen_leaves(setup, frozen, trained, leaves) | _made_leaves(
            without_lost_start(setup, meta["frozen"]), made, leaves, run
        )
        found = [*trained, *made]
        about = {"step": step, "ema": ema, "dtype": options.dtype}
        needed = sum(_size(leaves[path], options.dtype) for part in found for path in part.paths)
        with new_folder(to, needed) as draft:
            for part in found:
                _write_part(draft, part, leaves, setup, options)
            _write_bases(draft, setup, options)
            index = make_index(setup, found, about)
            _write_json(draft / RUN_CONFIG, shared(config))
            (draft / "README.md").write_text(model_card(setup, index, read_scores(run)))
            _write_json(draft / INDEX, index)
    return to


def _frozen_leaves(
    setup: Experiment, frozen: Params, found: list[Part], trained: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """What a part holds beside what trained. Raises UserError for a frozen connector: no file of the run has it."""
    wanted = set().union(*(part.paths for part in found)) - trained.keys()
    if not wanted:
        return {}
    structs = {path: flat(frozen)[path] for path in wanted}
    # Layers added to a published transformer start at zero, and are still there while they are frozen.
    added = {f"dit/{entry.path}" for entry in registry.of(setup.dit).added(setup.dit)}
    weights = {path: np.zeros(structs[path].shape, np.float32) for path in wanted & added}
    if missing := wanted - weights.keys():
        raise UserError(f"{setup.name}: no weights for the frozen parameter {min(missing)}, which the export needs")
    return {path: weights[path] for path in wanted}


def _made_leaves(setup: Experiment, made: list[Part], trained: Mapping[str, Any], run: Path) -> dict[str, np.ndarray]:
    """What no folder has, as the training made it from its seed, in the dtypes in which it kept what is frozen."""
    wanted = set().union(*(part.paths for part in made)) - trained.keys()
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    places = flat(placing.abstract(setup, mesh=mesh)) if wanted else {}
    found = runs.frozen_params(setup, {path: places[path] for path in wanted}, run) if wanted else {}
    return {path: np.asarray(leaf) for path, leaf in found.items()}


def _size(leaf: Any, dtype: str) -> int:
    return math.prod(leaf.shape) * jnp.dtype(dtype).itemsize


def write_weights(
    draft: Path, part: Part, leaves: Mapping[str, Any], setup: Experiment, options: Options
) -> LoraConfig | None:
    """The tensors of a part, from parameters by path; returns the config of its adapters if it holds such."""
    adapters = {layout.MLLM_LORA: setup.mllm.language.lora, layout.TRANSFORMER_LORA: layout.transformer_lora(setup)}
    config = adapters.get(part.folder)
    metadata = {}
    if part.folder == layout.TRANSFORMER_LORA:
        values = {f"{lora.DIFFUSERS}{k}": v for k, v in peft_config(part, config, lora.DIFFUSERS).items()}
        metadata = {"lora_adapter_metadata": json.dumps(values, sort_keys=True)}
    save_params(
        nested({path: leaves[path] for path in part.paths}),
        part.table,
        draft / part.folder,
        max_shard_bytes=options.shard_bytes if part.sharded else math.inf,
        dtype=options.dtype,
        metadata=metadata,
        stem=part.stem,
        progress=options.progress,
    )
    return config


def _write_part(draft: Path, part: Part, leaves: Mapping[str, Any], setup: Experiment, options: Options) -> None:
    config = write_weights(draft, part, leaves, setup, options)
    if part.folder == layout.MLLM_LORA:
        _write_json(draft / part.folder / "adapter_config.json", peft_config(part, config, lora.PEFT))
        (draft / part.folder / "README.md").write_text(GATE_NOTE)
    elif part.folder in (layout.TRANSFORMER, layout.TRANSFORMER_PARTIAL):
        _write_json(draft / part.folder / "config.json", registry.of(setup.dit).write(setup.dit))
    elif part.folder == layout.MLLM:
        _write_json(draft / part.folder / "config.json", _mllm_config(setup))
    elif part.folder == layout.TEXT_ENCODER:
        encoder = setup.text.encoder
        _write_json(draft / part.folder / "config.json", registry.of(encoder).write(encoder))
        load_tokenizer(setup.text.tokenizer).save_pretrained(str(draft / part.folder))


def _write_bases(draft: Path, setup: Experiment, options: Options) -> None:
    """Tokenizer, and the bases that are this project's own: nobody else has them."""
    if setup.mllm.tokenizer:
        save_tokenizer(load_tokenizer(setup.mllm.tokenizer), draft / "tokenizer")
    if setup.objective != "paint":
        return
    (draft / layout.CONNECTOR).mkdir(exist_ok=True)  # there is none in the baseline of text alone
    _write_json(draft / layout.CONNECTOR / "config.json", connector_config(setup))
    if own_weights(setup.mllm.weights):
        params, _ = saved.load(setup.mllm.weights)
        mllm = mllm_config(setup)
        table = registry.of(mllm).table(mllm)
        held = flat(params.get("mllm", params))
        held = nested({entry.path: held[entry.path] for entry in table})
        save_params(held, table, draft / layout.MLLM, dtype=options.dtype, progress=False)
        _write_json(draft / layout.MLLM / "config.json", _mllm_config(setup))
    if not registry.of(setup.vae).published and setup.vae_weights:
        params, _ = saved.load(setup.vae_weights)
        (draft / "vae").mkdir()
        leaves = {name: np.asarray(leaf) for name, leaf in sorted(flat(params).items())}
        shapes = {name: (leaf.dtype, leaf.shape) for name, leaf in leaves.items()}
        write_file(draft / "vae" / "model.safetensors", shapes, leaves.values(), {"format": "pt"})


def own_weights(folder: str) -> bool:
    """Whether a folder holds weights that this project trained, not published ones, as they are or imported."""
    return bool(folder) and (files.folder(folder) / "params.json").is_file() and published_base(folder) == folder


def published_base(folder: str) -> str:
    """The published folder behind a folder of weights: that from which ``metacanvas import`` made it, or itself."""
    if not folder or not (files.folder(folder) / "params.json").is_file():
        return folder
    return saved.described(folder)["meta"].get("source", folder)


def _mllm_config(setup: Experiment) -> dict[str, Any]:
    vocabulary = load_tokenizer(setup.mllm.tokenizer).get_vocab()
    return registry.of(mllm_config(setup)).write(mllm_config(setup), vocabulary)


def connector_config(setup: Experiment) -> dict[str, Any]:
    """The ``config.json`` of the connector: what ``torch_export/connector.py`` is built from."""
    added = dict.fromkeys(("extra_in", "pool"))
    if getattr(setup.dit, "extra_channels", 0):
        patch = list(setup.dit.patch)
        added["extra_in"] = {"channels": setup.dit.extra_channels, "width": setup.dit.width, "patch": patch}
    if getattr(setup.dit, "pooled", None) == "learned":
        added["pool"] = {"in_width": setup.dit.context_width, "out_width": setup.dit.pooled_width}
    sections = {name: getattr(setup, name) for name in ("canvas", "canvas_connector", "context_connector", "queries")}
    described = {name: None if part is None else dataclasses.asdict(part) for name, part in sections.items()}
    (described["context_connector"] or {}).pop("weights", None)  # a place on this machine, from which it started
    return {"mllm_width": setup.mllm.language.width, **described, **added}


def peft_config(part: Part, config: LoraConfig, prefix: str) -> dict[str, Any]:
    """The adapters of a part as PEFT describes them."""
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": lora.modules(part.table, prefix),
        "bias": "none",
        "inference_mode": True,
    }


def make_index(setup: Experiment, found: list[Part], about: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader needs to know to put the parts together."""
    folders = {part.folder for part in found}
    there = lambda name: name if name in folders else None  # noqa: E731
    index = {"format": "metacanvas", "version": VERSION, "name": setup.name, "objective": setup.objective, **about}
    own = layout.MLLM if layout.MLLM in folders or own_weights(setup.mllm.weights) else None
    mllm = {
        "kind": registry.of(mllm_config(setup)).name,
        "folder": own,
        "base": published_base(setup.mllm.weights),
        "lora": there(layout.MLLM_LORA),
        "gate": "canvas",
    }
    prompts = prompter(setup).config if setup.mllm.tokenizer else None
    prompt = None
    if prompts is not None:
        prompt = {
            "system": prompts.system,
            "assistant": prompts.assistant,
            "image_label": prompts.image_label,
            "template": CHAT,
            "length": max(bucket.length for bucket in setup.shapes),
            "tokens_per_second": prompts.tokens_per_second,
            "video_fps": setup.mllm.video_fps,
            "media": dataclasses.asdict(prompts.media),
        }
    index |= {"mllm": mllm, "prompt": prompt}
    if setup.objective != "paint":
        return index
    vae = autoencoder(setup)
    return index | {
        "backbone": registry.of(setup.dit).name,
        "connector": there(layout.CONNECTOR),
        "canvas": None if setup.canvas is None else dataclasses.asdict(setup.canvas),
        "queries": None if setup.queries is None else dataclasses.asdict(setup.queries),
        "mllm": mllm if setup.uses_mllm else None,
        "text": None if setup.text is None else _text(setup.text, there(layout.TEXT_ENCODER)),
        "transformer": {
            "folder": there(layout.TRANSFORMER),
            "partial": there(layout.TRANSFORMER_PARTIAL),
            "lora": there(layout.TRANSFORMER_LORA),
            "base": published_base(setup.dit_weights),
        },
        "settings": {
            "time_scale": getattr(setup.dit, "time_scale", 1000.0),
            "mask_context": getattr(setup.dit, "mask_context", True),
            "pooled": getattr(setup.dit, "pooled", None),
            "guidance": setup.dit_guidance,
            "least_time": setup.dit.least_time if getattr(setup.dit, "predicts", "velocity") == "data" else None,
        },
        "vae": {
            "kind": registry.of(setup.vae).name,
            "folder": "vae" if not registry.of(setup.vae).published and setup.vae_weights else None,
            "base": published_base(setup.vae_weights),
            "spatial": vae.spatial,
            "temporal": vae.temporal,
        },
        "latent_channels": vae.channels,
        "latents": list(latent_grid(setup)),
        "sampler": dataclasses.asdict(setup.sampler),
        "reading": reading(setup),
        "computed": computed(setup),
    }


def _text(text: TextSection, folder: str | None) -> dict[str, Any]:
    return {
        "kind": registry.of(text.encoder).name,
        "folder": folder,
        "base": published_base(text.weights),
        "length": text.length,
        "encoder": dataclasses.asdict(text.encoder),
        "instruction": INSTRUCTION if text.instruction else "",
        "reads_prompt": text.reads_prompt,
    }


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
