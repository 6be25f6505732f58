"""Puts a user's own pictures into a config: ``metacanvas train --config ... --data FOLDER``."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from metacanvas_jax import files, registry
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data import by_size, own
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError

VALIDATION = 0.05  # share of the samples that is kept out of the training
PREPARED = "prepared"  # folder of a run: what was made from its own samples
BAD = 0.05  # share of the samples that may be bad
MEMORY = 1 << 30  # bytes of decoded samples that are kept
JUDGES = ("scenes", "tasks")  # evaluators of OpenMoji drawings


def use(config: ConfigDict, data: str, workdir: str | os.PathLike, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Replaces the sources of a config by the samples in ``data``, one source for each of its tasks.

    A share ``VALIDATION`` of the samples, by the hash of their names, is kept for validation. What a miniature makes
    itself (tokenizer, autoencoder) is made of these samples, in the folder of the run, unless ``overrides`` name it.
    Returns what a user should know of the samples, by a word for each line.

    Raises UserError where ``data`` holds nothing that the config's tasks can use.
    """
    if config.objective != "paint":
        raise UserError(f"--data: {config.name} teaches an MLLM with drawings; it reads no pictures of yours")
    if given := [one.split("=")[0] for one in overrides if one.startswith("--config.sources")]:
        raise UserError(f"{given[0]} has no effect with --data, which makes the sources; leave one of them out")
    found = own.look(data)
    sections, notes = [], {}
    configured: Any = config.get("sources") or ()
    by_size_of = {source["task"] for source in configured if source.get("by_size")}
    for task, (size, clip) in _shapes(config).items():
        if found.by_size:
            sections.append(dataclasses.asdict(_sorted(found, task, clip)))
            notes["found"] = f"{found.path}: {by_size.read(found.path).there()} samples, sorted by size"
            continue
        if task in by_size_of:
            raise UserError(
                f"--data {data}: {config.name} trains on sorted samples; sort these first: metacanvas "
                f"prepare --by-bucket --config CONFIG --source {found.kind} --path {found.path} --task {task} "
                "--out FOLDER, and give --data FOLDER"
            )
        section = SourceSection(found.kind, found.path, task, validation=VALIDATION)
        seen = own.looked(section, clip)
        skips = found.lonely + math.ceil(BAD * seen.count)
        kept = seen.count * math.prod(size) * 3 * (clip.frames or 1) <= MEMORY
        sections.append(dataclasses.asdict(dataclasses.replace(section, max_skips=skips, in_memory=kept)))
        notes |= {"found": _found(found, seen, skips), "shape": _shape(seen, size)}
    with config.ignore_type():
        config.sources = tuple(sections)
        _evaluators(config)
        _places(config, files.absolute(workdir), {one.partition("=")[0] for one in overrides})
    return notes


def _shapes(config: ConfigDict) -> dict[str, tuple[tuple[int, int], Clip]]:
    """Rows and columns, and the clip of any size, of the first bucket of every task."""
    buckets: Sequence[Mapping[str, Any]] = config.get("buckets") or ()
    if not buckets:
        return {"text_to_image": ((config.world.size, config.world.size), Clip(frames=1))}
    clips = {
        bucket["task"]: Clip(frames=bucket["frames"], fps=bucket["fps"] if bucket["frames"] > 1 else None)
        for bucket in reversed(buckets)
    }
    return {bucket["task"]: (tuple(bucket["size"]), clips[bucket["task"]]) for bucket in reversed(buckets)}


def _sorted(found: own.Own, task: str, clip: Clip) -> SourceSection:
    """A source that is sorted by size. Raises UserError where its samples do not suit the task."""
    section = SourceSection(found.kind, found.path, task, validation=VALIDATION, by_size=True)
    samples = by_size.read(found.path).samples
    most = max(samples, key=lambda key: samples[key])
    own.looked(dataclasses.replace(section, path=files.join(found.path, most.name), by_size=False), clip)
    return dataclasses.replace(section, max_skips=math.ceil(BAD * sum(samples.values())))


def _evaluators(config: ConfigDict) -> None:
    """The validation loss in place of the judges of drawings."""
    names = [name for name in config.eval.evaluators if name not in JUDGES]
    config.eval.evaluators = tuple(names) if "flow_loss" in names else ("flow_loss", *names)


def _places(config: ConfigDict, workdir: str, given: set[str]) -> None:
    """Folders in the run for the tokenizer of fresh text networks, and for an autoencoder fitted to pictures."""
    prepared = files.join(workdir, PREPARED)
    for name in ("mllm", "text"):
        section = config.get(name)
        if section is not None and not section.weights and f"--config.{name}.tokenizer" not in given:
            section.tokenizer = files.join(prepared, "tokenizer")
    fitted = registry.family("vae")[config.vae.kind].fit is not None
    if fitted and "--config.vae_weights" not in given:
        config.vae_weights = files.join(prepared, "vae")


def _found(found: own.Own, seen: own.Looked, skips: int) -> str:
    lonely = f" ({found.lonely} without a text or without a picture are left out)" if found.lonely else ""
    return (
        f"{found.path}: {seen.count - found.lonely:,} samples of the layout {found.kind!r}{lonely}; a run stops after "
        f"{skips} bad ones"
    )


def _shape(seen: own.Looked, size: tuple[int, int]) -> str:
    rows, columns = size
    lost = seen.lost(size)
    loss = f"half lose {lost:.0%} of their area or more" if lost >= 0.005 else "most lose nothing"
    covered = f"scaled until they cover {rows} x {columns}, then cropped about the centre"
    text = f"{covered}: of {len(seen.sizes)} looked at, {loss}"
    return text + (f", {seen.smaller(size)} are smaller and enlarged" if seen.smaller(size) else "")
