"""A training in Weights & Biases (the ``wandb`` extra)."""

import os
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metacanvas_jax import files
from metacanvas_jax.report.pictures import Picture
from metacanvas_jax.train.boards import grouped

RUN_ID_BYTES = 256


class WeightsAndBiases:
    """A run of a project. A training that continues in ``folder`` continues its run, whose id lies in ``wandb/run_id``.

    wandb's own settings come from its environment variables: with WANDB_MODE=offline everything stays in
    ``folder/wandb``, and ``wandb sync`` sends it later. Curves have the training's step on their axis. Steps that are
    trained again after a crash are shown twice.
    """

    def __init__(
        self, folder: str | os.PathLike, resume: int = 0, *, project: str, name: str, config: Mapping[str, Any]
    ):
        import wandb  # pyright: ignore[reportMissingImports] # an extra

        folder = files.folder(folder)
        kept = folder / "wandb" / "run_id"
        known = files.read_text(kept, RUN_ID_BYTES).strip() if kept.exists() else ""
        self._near = None if files.is_local(folder) else tempfile.TemporaryDirectory()
        self._image = wandb.Image
        self._run = wandb.init(
            project=project,
            name=name,
            id=known or uuid.uuid4().hex[:12],
            resume="allow",
            dir=folder if self._near is None else Path(self._near.name),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )
        if not known:
            files.write(kept, f"{self._run.id}\n")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Picture]) -> None:
        """Scalars by group, and pictures."""
        row = {grouped(name): value for name, value in scalars.items()}
        row |= {name: self._image(picture) for name, picture in pictures.items()}
        self._run.log(row | {"step": step})

    def flush(self) -> None:
        """Nothing to do: wandb sends what it has from a process of its own."""

    def close(self) -> None:
        """Waits until everything is sent, or lies in the folder."""
        self._run.finish()
        if self._near is not None:
            self._near.cleanup()
