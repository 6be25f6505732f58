"""Peak host memory of exporting a run's checkpoint, against the size of a shard.

    python benchmarks/export_memory.py --gigabytes 4

writes a synthetic checkpoint of float32 parameters, then exports it in a new process, as `metacanvas export`
does: parameters stream from the checkpoint a few at a time. The folder is removed at the end.
"""

import argparse
import dataclasses
import json
import math
import shutil
import tempfile
from pathlib import Path

from import_memory import LAYERS, Peak, alone, nested, shapes, table


def write(folder: str, gigabytes: float) -> dict:
    import jax.numpy as jnp
    import numpy as np
    import optax

    from metacanvas_jax.train import store
    from metacanvas_jax.train.state import new_state

    params = {}
    for path, shape in shapes(gigabytes / 2).items():  # that function counts bfloat16
        row = np.random.default_rng(0).standard_normal((1 << 16) + 1, np.float32)
        params[path] = jnp.asarray(np.resize(row, shape))  # does not repeat in step with any axis
    state = dataclasses.replace(new_state({}, optax.identity()), params=nested(params))
    with store.Store(folder) as checkpoints:
        checkpoints.save(state, None, store.describe({}))
    return {}


def export(folder: str, out: str, gigabytes: float, shard: float) -> dict:
    import jax

    from metacanvas_jax.train import store
    from metacanvas_jax.train.stream import lazy_params
    from metacanvas_jax.weights.hf_export import save_params

    abstract = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes(gigabytes / 2).items()}
    with store.Store(folder, writable=False) as checkpoints, Peak() as peak:
        leaves = lazy_params(checkpoints, nested(abstract))
        files = save_params(leaves, table(), out, max_shard_bytes=shard, progress=False)
    return {
        "above start": peak.peak - peak.before,
        "peak": peak.peak,
        "seconds": peak.seconds,
        "files": len(files),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, default=None, help="where to make the temporary folder")
    parser.add_argument("--json", action="store_true", help="print numbers only")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="export_memory_", dir=arguments.folder))
    try:
        alone(write, str(folder / "run"), arguments.gigabytes)
        shard = arguments.shard_gb * 1e9
        result = alone(export, str(folder / "run"), str(folder / "out"), arguments.gigabytes, shard)
    finally:
        shutil.rmtree(folder)
    sizes = {path: 4 * math.prod(shape) for path, shape in shapes(arguments.gigabytes / 2).items()}
    result |= {"checkpoint": sum(sizes.values()), "largest": max(sizes.values()), "shard": shard}
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"checkpoint {result['checkpoint'] / 1e9:.2f} GB, largest parameter ({LAYERS} layers) "
        f"{result['largest'] / 1e9:.2f} GB, {result['files']} files of at most {shard / 1e9:g} GB\n"
        f"peak RSS {result['peak'] / 1e9:.2f} GB = {result['peak'] / shard:.2f} shards "
        f"({result['above start'] / 1e9:.2f} GB above the start); {result['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
