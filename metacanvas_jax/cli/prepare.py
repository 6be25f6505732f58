"""``metacanvas prepare``."""

import argparse
from typing import Any, get_args

from metacanvas_jax.cli import options
from metacanvas_jax.errors import UserError
from metacanvas_jax.task_table import TASKS

EXAMPLE = """metacanvas prepare --config configs/miniature.py --config.data.path=/data/scenes --config.data.count=50000
         metacanvas prepare --source webdataset --path 'shards/*.tar' --out data/pictures --size 512x512
         metacanvas prepare --source parquet --path 'edits/*.parquet' --task image_editing --out data/OmniEdit-ratios \
           --by-bucket --config configs/image_editing.py:ratios
         metacanvas prepare --config configs/t2i_lora.py --config.mllm.context_cache=data/contexts --contexts
         metacanvas prepare --verify data/pictures"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="config file; alone: write everything it needs")
    source = parser.add_argument_group("a source, turned into array_record shards (layouts: docs/data.md)")
    source.add_argument("--source", metavar="KIND", help="records, tfds, webdataset, jsonl, files, parquet, ...")
    source.add_argument("--path", default="", help="folder, file or pattern of the source")
    source.add_argument("--out", help="folder to write, local or gs://")
    source.add_argument("--task", choices=TASKS, default="text_to_image", help="what the samples serve for")
    source.add_argument("--size", metavar="ROWSxCOLUMNS", help="scale and crop to this many pixels")
    source.add_argument(
        "--by-bucket",
        action="store_true",
        help="sort into a folder per size, or per size and length of prompts, for by_size: those of the config's "
        "buckets of --task",
    )
    source.add_argument("--frames", type=int, help="frames of every video (4k + 1); pictures need none")
    source.add_argument("--fps", type=float, help="frames taken per second")
    source.add_argument("--column", metavar="PART=NAME", action="append", default=[], help="e.g. prompt=json.caption")
    source.add_argument("--split", default="train", help="split of a TFDS folder")
    source.add_argument("--count", type=int, default=10_000, help="number of drawn samples")
    source.add_argument("--max-skips", type=int, default=0, help="bad records to leave out before stopping")
    source.add_argument("--jpeg", type=int, metavar="QUALITY", help="store JPEG of this quality instead of PNG")
    source.add_argument("--per-shard", type=int, default=1024, help="samples in a shard")
    source.add_argument("--batch", type=int, default=16, help="samples that are encoded at once")
    source.add_argument("--latents", action="store_true", help="store the latents of the config's autoencoder too")
    source.add_argument(
        "--latents-dtype", choices=("float32", "float16"), default="float32", help="float16 takes half the space"
    )
    source.add_argument(
        "--latents-compute",
        choices=("float32", "config"),
        default="float32",
        help="dtype in which the autoencoder computes them; config: as a training does, faster and less exact",
    )
    source.add_argument(
        "--every-frame", action="store_true", help="with --latents: store the pixels of whole videos as well"
    )
    source.add_argument("--process", metavar="I/N", help="this is process I (from 0) of N, on one file system")
    parser.add_argument("--contexts", action="store_true", help="store what the config's MLLM makes of every prompt")
    parser.add_argument("--verify", metavar="FOLDER", help="compare every shard with the manifest")


def run(arguments: argparse.Namespace) -> None:
    """Writes what a config needs (data, tokenizer, autoencoder), or turns one source into array_record shards."""
    if arguments.verify is not None:
        from metacanvas_jax import files
        from metacanvas_jax.data import by_size
        from metacanvas_jax.data.formats.manifest import verify

        if (files.folder(arguments.verify) / by_size.SIZES).exists():
            found = by_size.verify(arguments.verify)
            print(f"{arguments.verify}: {sum(found.samples.values())} samples, all as written: {found.there()}")
            return
        manifest = verify(arguments.verify)
        print(f"{arguments.verify}: {manifest['count']} samples in {len(manifest['shards'])} shards, all as written")
        return
    if not (arguments.contexts or arguments.latents):
        options.on_host()
    elif arguments.process is None:  # else every host of a slice runs the command
        from metacanvas_jax.parallel.distributed import check_alone

        check_alone("--process I/{hosts}, I from 0")
    options.keep_compiled()
    setup = None
    if arguments.config is not None:
        from metacanvas_jax.config import read
        from metacanvas_jax.config.load import load_config

        setup = read.experiment(load_config(arguments.config, arguments.overrides))
    if arguments.contexts:
        _write_contexts(arguments, setup)
        return
    if arguments.source is None:
        if setup is None:
            raise UserError("name --config FILE, or --source KIND with --path and --out")
        from metacanvas_jax.launch.prepare import prepare

        for path in prepare(setup):
            print(path)
        return
    _write_source(arguments, setup)


def _write_contexts(arguments: argparse.Namespace, setup: Any) -> None:
    from metacanvas_jax import precompute

    if setup is None or arguments.source is not None:
        raise UserError("--contexts needs --config, whose own sources are read, and no --source")
    index, count = _process(arguments.process)
    done = precompute.fill_contexts(setup, arguments.batch, process_index=index, process_count=count)
    print(f"{setup.mllm.context_cache}: the contexts of {done} samples")


def _write_source(arguments: argparse.Namespace, setup: Any) -> None:
    from metacanvas_jax import precompute
    from metacanvas_jax.config.sources import Kind, SourceSection
    from metacanvas_jax.data import inputs, sorting
    from metacanvas_jax.data.examples import frames_of_source
    from metacanvas_jax.data.formats import shards
    from metacanvas_jax.data.lengths import Lengths
    from metacanvas_jax.data.sources import prepare
    from metacanvas_jax.data.transforms import Clip
    from metacanvas_jax.worlds.scenes import SceneWorld

    if arguments.source not in get_args(Kind):
        raise UserError(f"--source {arguments.source}: expected one of {', '.join(get_args(Kind))}")
    if arguments.out is None:
        raise UserError("--source needs --out, the folder to write")
    if arguments.latents and setup is None:
        raise UserError("--latents needs --config, which says what they are computed with")
    if arguments.every_frame and not arguments.latents:
        raise UserError("--every-frame goes with --latents; without latents every frame is stored anyway")
    if arguments.by_bucket and setup is None:
        raise UserError("--by-bucket needs --config, whose buckets of --task have the sizes")
    for option in ("size", "frames", "fps") if arguments.by_bucket else ():
        if getattr(arguments, option) is not None:
            raise UserError(f"--{option} has no effect with --by-bucket, which reads it from the config's buckets")
    try:
        section = SourceSection(
            kind=arguments.source,
            path=arguments.path,
            task=arguments.task,
            split=arguments.split,
            columns=tuple(_pair(column) for column in arguments.column),
            max_skips=arguments.max_skips,
            count=arguments.count,
        )
        if arguments.by_bucket:
            buckets = sorting.chosen(setup.shapes, arguments.task)
            clip = sorting.clip_of(buckets[0])
        else:
            buckets, clip = [], Clip(options.size(arguments.size), arguments.frames, arguments.fps)
    except ValueError as error:
        raise UserError(str(error)) from error
    index, count = _process(arguments.process)
    first_frame = arguments.latents and not arguments.every_frame
    read = frames_of_source(clip, setup.mllm.video_fps) if first_frame and clip.frames else ()
    config = shards.WriteConfig(
        arguments.per_shard, arguments.jpeg, arguments.batch, index, count, first_frame=first_frame, source_frames=read
    )
    world = SceneWorld() if setup is None else setup.world
    compute, identity = None, {}
    if arguments.latents:
        exact = arguments.latents_compute == "float32"
        compute, identity = precompute.make_latents(setup, arguments.batch, arguments.latents_dtype, exact=exact)
    ahead = {"compute": compute, "computed": identity}
    if arguments.by_bucket:
        measured = any(bucket.by_length for bucket in buckets)
        lengths = Lengths(inputs.prompter(setup), buckets, setup.mllm.video_fps) if measured else None
        written = sorting.sort(section, arguments.out, buckets, config, world, lengths=lengths, **ahead)
    else:
        written = prepare(section, arguments.out, clip, config, world, **ahead)
    if written is None:
        print(f"process {index} of {count} is done; shards of the others are missing, {arguments.out} is not complete")
    elif arguments.by_bucket:
        print("\n".join(sorting.report(written)))
    else:
        print(written)


def _pair(text: str) -> tuple[str, str]:
    part, equals, name = text.partition("=")
    if not equals or not name:
        raise UserError(f"--column {text}: expected PART=NAME, such as prompt=caption")
    return part, name


def _process(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    index, _, count = text.partition("/")
    if not index.isdigit() or not count.isdigit():
        raise UserError(f"--process {text}: expected I/N, such as 0/4")
    return int(index), int(count)
