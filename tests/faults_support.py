"""A training that things happen to, as real processes.

It trains `train_support`'s network on a mixture of two buckets, one of them of two sources, and prints the checksums of
what came out. The options say what goes wrong.
"""

import dataclasses
import functools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import train_support as support
from kill_support import kill_at_event

from metacanvas_jax.data.mixture import Mixture, Source, Stream
from metacanvas_jax.data.pipeline import PipelineConfig, pipeline
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import Lost, Preempted, UserError
from metacanvas_jax.parallel.distributed import together
from metacanvas_jax.parallel.mesh import MeshConfig
from metacanvas_jax.train.job import FitConfig
from metacanvas_jax.train.loop import fit
from metacanvas_jax.weights.hashes import checksums

ROOT = Path(__file__).parents[1]
CONFIG = FitConfig(steps=12, accumulate=2, ema_decay=0.9, log_every=1, checkpoint_every=3, barrier_s=60)


class Numbered:
    """A source of samples that differ in their number."""

    def __init__(self, count, name):
        self.count, self.name = count, name

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Sample(f"{self.name} {index}", np.full((1, 1, 1, 3), index % 256, np.uint8))


def example(sample, rng):
    """A sample's features; noise and a dropped caption depend on its place in the stream."""
    x = np.concatenate([sample.target.ravel() / 256, [len(sample.prompt)], rng.normal(size=support.WIDTH - 4)])
    return x.astype(np.float32)


def collate(examples):
    x = np.stack(examples)
    return {"x": x, "y": np.sin(2 * x[:, :1])}


class Faulty:
    """A stream of batches that fails, or is asked to stop, at a step."""

    def __init__(self, stream, options):
        self.stream, self.options = stream, options
        self.get_state, self.set_state = stream.get_state, stream.set_state

    def __next__(self):
        step = self.stream.get_state()["step"] + 1
        here = self.options.get("on", jax.process_index()) == jax.process_index()
        if here and step == self.options.get("corrupt"):
            raise UserError(f"record of step {step} is corrupt")
        if here and step == self.options.get("bug"):
            raise KeyError(f"bug at step {step}")
        if here and step == self.options.get("sigterm"):
            os.kill(os.getpid(), signal.SIGTERM)
        if here and step == self.options.get("kill"):
            threading.Timer(self.options["delay"], os.kill, (os.getpid(), signal.SIGKILL)).start()
        if here and step == self.options.get("full_disk"):
            while not Path(self.options["after"]).exists():
                time.sleep(0.01)
            fill_disk(True)
        batch = next(self.stream)
        if here and step == self.options.get("nan"):
            batch["x"][0] = np.nan
        return batch


def fill_disk(yes):
    """Lets no file grow beyond 64 bytes, which every library takes as it takes a full disk."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 if yes else most, most))


def job(options):
    def batches():
        config = PipelineConfig(16, seed=5, caption_dropout=0.3)
        place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        sources = [Source(Numbered(50, "first"), 2.0), Source(Numbered(30, "another"))]
        buckets = [
            Stream("two", pipeline(sources, config, collate, format=example, **place), 3.0),
            Stream("one", pipeline([Source(Numbered(40, "third one"))], config, collate, format=example, **place)),
        ]
        return Faulty(Mixture(buckets, seed=9), options)

    whole = {name: jax.ShapeDtypeStruct((16, width), np.float32) for name, width in (("x", support.WIDTH), ("y", 1))}
    return support.job(batches=batches, shapes=lambda: {"two": whole, "one": whole})


def config(options):
    names = {field.name for field in dataclasses.fields(FitConfig)}
    changes = {name: value for name, value in options.items() if name in names and name != "mesh"}
    return dataclasses.replace(CONFIG, mesh=MeshConfig(**options.get("mesh", {})), **changes)


def main(folder, options):
    group = [options.get(name) for name in ("processes", "coordinator", "process")]
    seen = kill_at_event(folder / "checkpoints", options["event"]) if "event" in options else [0]
    with together(*group, timeout_s=options.get("timeout_s", 100)):
        state, _ = fit(job(options), config(options), folder, progress=False)
        print("final", json.dumps(checksums(state)), flush=True)
        print("events", seen[0], flush=True)


def run(folder, devices=1, **options):
    """Runs it as one process with that many virtual devices; returns exit code and output."""
    codes, outputs = _run([(folder, devices, options)])
    return codes[0], outputs[0]


def run_together(folder, count, devices=1, **options):
    """Runs it as several processes; returns their exit codes and outputs."""
    with socket.create_server(("", 0)) as server:
        group = {"processes": count, "coordinator": f"localhost:{server.getsockname()[1]}"}
    return _run([(folder, devices, options | group | {"process": process}) for process in range(count)])


def _run(requests):
    """Real processes, but forked from one that has imported everything: most of a start is importing."""
    server = _server()
    print(json.dumps([(str(folder), devices, options) for folder, devices, options in requests]), file=server.stdin)
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@functools.cache
def _server():
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


def serve():
    """Forks processes as lines of standard input ask, and prints their exit codes and outputs."""
    for line in sys.stdin:
        children, outputs = [], []
        for folder, devices, options in json.loads(line):
            output = os.memfd_create("output")
            pid = os.fork()
            if pid == 0:
                os.dup2(output, 1)
                os.dup2(output, 2)
                become(Path(folder), devices, options)
            children.append((pid, output))
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, _ in children]
        for _, output in children:
            os.lseek(output, 0, os.SEEK_SET)
            with os.fdopen(output, errors="replace") as file:
                outputs.append(file.read())
        print(json.dumps([codes, outputs]), flush=True)


def become(folder, devices, options):
    """What a process of its own would do, to its exit."""
    signal.alarm(900)  # a process that hangs is a failure
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        main(folder, options)
    except (Preempted, Lost) as stop:
        print(stop, flush=True)
        sys.exit(75)
    except UserError as error:
        fill_disk(False)
        print(str(error).replace("\n", "\\n"), flush=True)  # so that a message of two lines is seen to be one
        sys.exit(2)
    sys.exit(0)


def final(output):
    """The checksums that the program printed."""
    lines = [line for line in output.splitlines() if line.startswith("final ")]
    assert lines, output
    return json.loads(lines[-1].removeprefix("final "))


def rows(folder):
    """The run's records without their timing."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in support.TIMING} for row in lines]


if __name__ == "__main__":
    serve()
