"""What a canvas costs in the MLLM: reading a context once and writing on it, against one joint pass.

    python benchmarks/mllm_canvas.py [--context 512] [--canvas 660] [--repeats 3]

Operations of matrix products are counted on the traced programs of Qwen2.5-VL-3B and 7B, and of a small decoder that is
also timed here. Rows: ``encode`` without gradient, then ``write`` with the gradient of canvas tokens and LoRA;
``write`` alone, when the context comes from the disk cache; one joint pass forward and backward, with the gradient of
canvas tokens and LoRA, and with that of all parameters. "MB at peak" is the temporary memory of the compiled program,
mostly what is kept for the backward pass. Percentages are of the last row.
"""

import argparse
import dataclasses
import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig, Qwen25VL, qwen2_5_vl_3b, qwen2_5_vl_7b
from metacanvas_jax.mllm.vision_language import example
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.train import flops
from metacanvas_jax.types import MllmInputs

LORA = LoraConfig(rank=64, alpha=64.0)
SMALL = MllmConfig(
    LanguageConfig(
        vocab=1024, width=512, layers=6, heads=8, kv_heads=2, mlp=1536, rope_sections=(8, 12, 12), tied=True, lora=LORA
    )
)


def programs(config: MllmConfig, length: int, tokens: int):
    """The rows of the table, each ``(params, inputs, canvas, context) -> loss and gradients``, and their shapes."""
    model = Qwen25VL(config)
    positions = jnp.broadcast_to(jnp.arange(length, length + tokens, dtype=jnp.int32), (3, 1, tokens))

    def lora_of(params):
        flat = flatten_dict(params)
        lora = {path: leaf for path, leaf in flat.items() if any("lora" in name for name in path)}
        return lora, {path: leaf for path, leaf in flat.items() if path not in lora}

    def write(params, inputs, canvas, context):
        lora, frozen = lora_of(params)

        def loss(canvas, lora):
            tree = {"params": unflatten_dict(frozen | lora)}
            return jnp.mean(model.apply(tree, canvas, positions, context, method="write") ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(canvas, lora)

    def encode(params, inputs):
        return jax.lax.stop_gradient(model.apply({"params": params}, inputs, method="encode"))

    def split(params, inputs, canvas, context):
        return write(params, inputs, canvas, encode(params, inputs))

    def joint(params, inputs, canvas, context, *, everything: bool):
        lora, frozen = lora_of(params)

        def loss(canvas, lora, frozen):
            tree = {"params": unflatten_dict(frozen | lora)}
            return jnp.mean(model.apply(tree, inputs, canvas, positions, method="joint")[1] ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1, 2) if everything else (0, 1))(canvas, lora, frozen)

    rows = {
        "encode + write": split,
        "write, context from disk": write,
        "joint, canvas and LoRA train": functools.partial(joint, everything=False),
        "joint, everything trains": functools.partial(joint, everything=True),
    }
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *example(config)))["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, config.language.dtype), params)
    inputs = MllmInputs(
        jax.ShapeDtypeStruct((1, length), jnp.int32),
        jax.ShapeDtypeStruct((3, 1, length), jnp.int32),
        jax.ShapeDtypeStruct((1, length), bool),
    )
    canvas = jax.ShapeDtypeStruct((1, tokens, config.language.width), config.language.dtype)
    return rows, (params, inputs, canvas, jax.eval_shape(encode, params, inputs))


def text_only(config: MllmConfig) -> MllmConfig:
    """The decoder alone: the vision tower is the same on both sides."""
    return dataclasses.replace(config, vision=None)


def counted(config: MllmConfig, length: int, tokens: int) -> dict[str, float]:
    """Floating-point operations of the matrix products of every row."""
    rows, shapes = programs(config, length, tokens)
    counts = {name: flops.count(jax.make_jaxpr(program)(*shapes), "cpu") for name, program in rows.items()}
    return {name: sum(item.flops for item in found) for name, found in counts.items()}


def timed(config: MllmConfig, length: int, tokens: int, repeats: int) -> dict[str, tuple[float, int]]:
    """Best CPU seconds and bytes of temporary memory of every row."""
    rows, shapes = programs(config, length, tokens)
    rng = np.random.default_rng(0)

    def fill(x):
        return jnp.asarray(0.05 * rng.standard_normal(x.shape) if x.dtype == jnp.float32 else np.ones(x.shape), x.dtype)

    arguments = jax.tree.map(fill, shapes)
    out = {}
    for name, program in rows.items():
        compiled = jax.jit(program).lower(*arguments).compile()
        jax.block_until_ready(compiled(*arguments))
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            jax.block_until_ready(compiled(*arguments))
            seconds.append(time.process_time() - start)
        out[name] = min(seconds), compiled.memory_analysis().temp_size_in_bytes
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=512, help="tokens of the context")
    parser.add_argument("--canvas", type=int, default=660, help="canvas tokens")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the fastest counts")
    options = parser.parse_args()
    sizes = {
        "3B": text_only(qwen2_5_vl_3b(lora=LORA, dtype="bfloat16")),
        "7B": text_only(qwen2_5_vl_7b(lora=LORA, dtype="bfloat16")),
        "small": SMALL,
    }
    base = "joint, everything trains"
    print(f"one sample, context {options.context} tokens, canvas {options.canvas} tokens, decoder only")
    for name, config in sizes.items():
        counts = counted(config, options.context, options.canvas)
        print(f"\n{name:30s}{'GFLOP':>12s}")
        for row, count in counts.items():
            print(f"{row:30s}{count / 1e9:12.1f} {count / counts[base]:5.0%}", flush=True)
    runs = timed(SMALL, options.context, options.canvas, options.repeats)
    print(f"\n{'small':30s}{'CPU seconds':>12s}{'MB at peak':>18s}")
    for row, (seconds, memory) in runs.items():
        whole, most = runs[base]
        print(f"{row:30s}{seconds:12.3f} {seconds / whole:5.0%}{memory / 1e6:12.0f} {memory / most:5.0%}")


if __name__ == "__main__":
    main()
