"""Peak host memory of importing, sharding and exporting a synthetic checkpoint, against the size of the model.

    python benchmarks/import_memory.py --gigabytes 3

writes random bfloat16 shards of the size of a decoder into a temporary folder. Each case runs in a new process.
Its peak resident memory is printed, less the memory of the process at its start. The folder is removed at the end.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

LAYERS, HEAD = 4, 128
DEVICES = 8


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a decoder of that size in bfloat16: the embedding takes a tenth, layers the rest."""
    width = 128 * max(1, round((gigabytes * 1e9 * 0.9 / 2 / LAYERS / 12) ** 0.5 / 128))
    vocabulary = 128 * max(1, round(gigabytes * 1e9 * 0.1 / 2 / width / 128))
    return {
        "embedding/table": (vocabulary, width),
        "layers/q/kernel": (LAYERS, width, 2 * width),
        "layers/up/kernel": (LAYERS, width, 5 * width),
        "layers/down/kernel": (LAYERS, 5 * width, width),
        "layers/norm/scale": (LAYERS, width),
    }


def table():
    from metacanvas_jax.weights.table import LINEAR, SAME, Entry, half_split, then

    return [
        Entry("embed.weight", "embedding/table", SAME),
        Entry("layers.{i}.q.weight", "layers/q/kernel", then(LINEAR, half_split(HEAD)), LAYERS),
        Entry("layers.{i}.up.weight", "layers/up/kernel", LINEAR, LAYERS),
        Entry("layers.{i}.down.weight", "layers/down/kernel", LINEAR, LAYERS),
        Entry("layers.{i}.norm.weight", "layers/norm/scale", SAME, LAYERS),
    ]


class Random:
    """A leaf that makes its numbers when they are asked for."""

    def __init__(self, shape: tuple[int, ...]):
        import ml_dtypes
        import numpy as np

        self.shape, self.dtype = shape, np.dtype(ml_dtypes.bfloat16)
        self.row = np.random.default_rng(0).standard_normal(shape[-1]).astype(self.dtype)

    def __getitem__(self, index):
        import numpy as np

        shape = self.shape if index is ... else self.shape[1:]
        return np.broadcast_to(self.row, shape)


def nested(flat):
    from flax.traverse_util import unflatten_dict

    return unflatten_dict(flat, sep="/")


class Peak:
    """Largest resident memory inside the block, above what was resident before, sampled every 2 ms."""

    def __enter__(self):
        self.before = self.peak = self.resident()
        self.running = True
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.start
        self.running = False
        self.thread.join()

    def sample(self):
        while self.running:
            self.peak = max(self.peak, self.resident())
            time.sleep(0.002)

    @staticmethod
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def export(folder: str, gigabytes: float) -> dict:
    from metacanvas_jax.weights.hf_export import save_params

    leaves = {path: Random(shape) for path, shape in shapes(gigabytes).items()}
    with Peak() as peak:
        save_params(nested(leaves), table(), folder, max_shard_bytes=1e9)
    return {"peak": peak.peak - peak.before, "seconds": peak.seconds}


def load(folder: str, gigabytes: float, dtype: str, sharded: bool) -> dict:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from metacanvas_jax.weights.hf_import import load_params
    from metacanvas_jax.weights.safetensors_io import Checkpoint

    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    structs = {}
    for path, shape in shapes(gigabytes).items():
        spec = PartitionSpec(*(None for _ in shape[1:]), "fsdp") if path != "embedding/table" else PartitionSpec("fsdp")
        sharding = NamedSharding(mesh, spec) if sharded else None
        structs[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    checkpoint = Checkpoint(folder)
    with Peak() as peak:
        params = jax.block_until_ready(load_params(checkpoint, table(), nested(structs)))
    del params
    return {"peak": peak.peak - peak.before, "seconds": peak.seconds, "read": checkpoint.bytes_read}


def convert(folder: str, out: str, gigabytes: float) -> dict:
    """What `metacanvas import` does with a published model."""
    import jax

    from metacanvas_jax.weights import published, saved

    structs = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes(gigabytes).items()}
    with Peak() as peak:
        saved.save(out, nested(published.lazy(folder, table(), nested(structs), ())))
    return {"peak": peak.peak - peak.before, "seconds": peak.seconds}


def _run(connection, function, arguments):
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    import jax

    jax.devices()
    connection.send(function(*arguments))


def alone(function, *arguments) -> dict:
    """Runs a function in a fresh process and returns its answer."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    return answer


def measure(gigabytes: float, folder: Path) -> dict:
    """Every case: bytes of the model, of its largest tensor, and at peak."""
    sizes = {path: math.prod(shape) for path, shape in shapes(gigabytes).items()}
    model = sum(sizes.values())
    largest = max(size // (LAYERS if path.startswith("layers") else 1) for path, size in sizes.items())
    results = {"model": 2 * model, "largest": 2 * largest}
    results["export"] = alone(export, str(folder / "weights"), gigabytes)
    results["import"] = alone(load, str(folder / "weights"), gigabytes, "bfloat16", False)
    results["convert"] = alone(convert, str(folder / "weights"), str(folder / "out"), gigabytes)
    results["import, 8 devices"] = alone(load, str(folder / "weights"), gigabytes, "bfloat16", True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, default=None, help="where to make the temporary folder")
    parser.add_argument("--json", action="store_true", help="print numbers only")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="import_memory_", dir=arguments.folder))
    try:
        results = measure(arguments.gigabytes, folder)
    finally:
        shutil.rmtree(folder)
    if arguments.json:
        print(json.dumps(results))
        return
    model, largest = results["model"], results["largest"]
    print(f"model {model / 1e9:.3f} GB, largest tensor {largest / 1e9:.3f} GB, bfloat16")
    for case in ("import", "import, 8 devices"):
        peak, seconds = results[case]["peak"], results[case]["seconds"]
        print(
            f"{case:20} peak {peak / 1e9:.3f} GB = model + {(peak - model) / largest:.2f} largest tensors"
            f" = {peak / model:.3f} models; read {results[case]['read'] / 1e9:.3f} GB in {seconds:.1f} s"
        )
    peak = results["export"]["peak"]
    most = max(math.prod(shape) for shape in shapes(arguments.gigabytes).values()) * 4
    found = results["convert"]["peak"]
    print(f"{'metacanvas import':20} peak {found / 1e9:.3f} GB = {found / most:.2f} largest parameters in float32")
    print(f"{'export':20} peak {peak / 1e9:.3f} GB = {peak / largest:.2f} largest tensors; shards of 1 GB")


if __name__ == "__main__":
    main()
