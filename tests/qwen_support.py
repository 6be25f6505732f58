"""Tiny Qwen2.5-VL networks, a tokenizer and random media for the tests of the MLLM."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from metacanvas_jax.mllm import prompt as prompt_module
from metacanvas_jax.mllm.media import MediaConfig, Patches
from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig, Qwen25VL
from metacanvas_jax.mllm.qwen2_5_vl.vision import VisionConfig
from metacanvas_jax.mllm.vision_language import example

VOCAB = 300
LANGUAGE = LanguageConfig(
    vocab=VOCAB, width=64, layers=3, heads=4, kv_heads=2, mlp=112, rope_sections=(2, 3, 3), rope_theta=1e6
)
VISION = VisionConfig(
    depth=4, width=32, heads=2, mlp=52, out_width=64, full_attention_layers=(1, 3), patch=14, window=112
)
TINY = MllmConfig(LANGUAGE, VISION)
TEXT_ONLY = MllmConfig(LANGUAGE)
MEDIA = MediaConfig()
SPECIAL = (
    prompt_module.PADDING,
    prompt_module.START,
    prompt_module.END,
    prompt_module.VISION_START,
    prompt_module.VISION_END,
    prompt_module.IMAGE,
    prompt_module.VIDEO,
)
WORDS = "system You are a helpful assistant. user What is in this picture? A red cat beside a blue house, painted."


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer cut like Qwen's, with its special tokens at other numbers than the published ones."""
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator([WORDS] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner)
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return fast


def random_media(grid: tuple[int, int, int], *, seconds: float | None = None, seed: int = 0) -> Patches:
    """Random patches of a grid."""
    values = np.random.default_rng(seed).standard_normal((int(np.prod(grid)), MEDIA.values), np.float32)
    return Patches(values, grid, seconds)


def abstract_params(config: MllmConfig):
    """Shapes of all parameters."""
    return nn.unbox(jax.eval_shape(Qwen25VL(config).init, jax.random.key(0), *example(config)))["params"]


def random_params(config: MllmConfig, *, seed: int = 0):
    """Random parameters of every kind (gains, biases and adapters too), unboxed."""
    leaves, tree = jax.tree.flatten_with_path(abstract_params(config))
    rng = np.random.default_rng(seed)

    def make(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        name = path[-1].key
        if name == "scale":
            return 1 + 0.2 * noise
        return (0.1 if name == "bias" else leaf.shape[-2] ** -0.5) * noise

    return jax.tree.unflatten(tree, [jnp.asarray(make(path, leaf)) for path, leaf in leaves])
