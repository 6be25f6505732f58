"""How a run reads what it is asked to paint, as data of its export, which ``torch_export/reading.py`` applies."""

import inspect
from typing import Any

from metacanvas_jax import registry
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.mllm.media import sample_frames
from metacanvas_jax.paint.requests import unit
from metacanvas_jax.trees import stays_float32

VERSION = 1


def reading(setup: Experiment) -> dict[str, Any]:
    """The section ``reading`` of an export's index."""
    limits = {name: x.default for name, x in inspect.signature(sample_frames).parameters.items()}
    by_size = sorted({bucket.task for bucket in setup.drawn if setup.sizes_of(bucket.task)})
    rules = {
        "version": VERSION,
        "shapes": [
            {
                "task": bucket.task,
                "size": list(bucket.size),
                "frames": bucket.frames,
                "fps": bucket.fps,
                "length": bucket.length,
            }
            for bucket in setup.drawn
        ],
        "unit": unit(setup),
        "frames": {"target": setup.mllm.video_fps, **{name: limits[name] for name in ("least", "most", "multiple")}},
    }
    return rules | ({"by_size": by_size} if by_size else {})


def computed(setup: Experiment) -> dict[str, Any]:
    """The section ``computed``: the dtype in which the run computed each network, and kept its frozen weights.

    ``float32_weights`` lists what it kept in float32 nevertheless.
    """
    parts = {"transformer": setup.dit, "mllm": setup.mllm.language, "vae": setup.vae}
    parts |= {"canvas_connector": setup.canvas_connector, "context_connector": setup.context_connector}
    if setup.text is not None:
        parts["text_encoder"] = setup.text.encoder
    found = {name: getattr(part, "dtype", None) for name, part in parts.items() if part is not None}
    found["frozen_weights"] = setup.train.frozen_dtype
    return {name: dtype for name, dtype in found.items() if dtype is not None} | _float32_weights(setup)


def _float32_weights(setup: Experiment) -> dict[str, Any]:
    """Patterns of the transformer's published tensors that stay float32 whatever ``frozen_weights`` is; {} if none."""
    record = registry.of(setup.dit)
    entries = [entry for entry in record.table(setup.dit) if stays_float32(entry.path, record.keep_float32)]
    names = [entry.name.replace("{i}", "*") for entry in entries]
    return {"float32_weights": {"transformer": names}} if names else {}
