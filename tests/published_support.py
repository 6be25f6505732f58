"""Tiny networks of the published kinds, and pipelines of them in torch."""

import dataclasses

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from metacanvas_jax.dit.flux.network import FluxConfig
from metacanvas_jax.dit.flux2.network import Flux2Config
from metacanvas_jax.dit.qwen_image.network import QwenImageConfig
from metacanvas_jax.dit.sana.network import SanaConfig
from metacanvas_jax.dit.wan.network import WanConfig
from metacanvas_jax.text.gemma2.network import Gemma2Config
from metacanvas_jax.text.qwen3.network import Qwen3Config
from metacanvas_jax.vae.dc_ae.network import DcAeConfig
from metacanvas_jax.vae.flux2.network import Flux2VaeConfig
from metacanvas_jax.vae.kl.network import KlConfig
from metacanvas_jax.vae.wan.network import WanVaeConfig

Z = 4
SANA = SanaConfig(latent_channels=Z, heads=4, head_width=16, cross_heads=2, layers=2, context_width=32, sample_size=16)
FLUX = FluxConfig(
    latent_channels=Z,
    layers_double=1,
    layers_single=1,
    heads=2,
    head_width=16,
    context_width=20,
    pooled_width=12,
    rope_axes=(4, 6, 6),
)
WAN = WanConfig(latent_channels=Z, heads=2, head_width=20, mlp=48, layers=2, context_width=24, freq=32)
DC_AE = DcAeConfig(
    channels=(8, 16, 16),
    encoder_blocks=(1, 1, 1),
    decoder_blocks=(1, 1, 1),
    attention_from=2,
    latent_channels=Z,
    head_width=8,
    scale=0.41407,
)
KL = KlConfig(channels=(8, 16, 16), blocks=1, latent_channels=Z, groups=4, scale=0.3611, shift=0.1159)
WAN_VAE = WanVaeConfig(
    encoder_width=4,
    decoder_width=6,
    multipliers=(1, 2, 2, 2),
    blocks=1,
    halve_time=(False, True, True),
    latent_mean=tuple(0.1 * i for i in range(Z)),
    latent_std=tuple(1 + 0.1 * i for i in range(Z)),
)
WAN21_VAE = dataclasses.replace(WAN_VAE, decoder_width=4, folded=1, shortcuts=False)
QWEN_IMAGE = QwenImageConfig(
    latent_channels=Z, layers=2, heads=2, head_width=16, context_width=64, rope_axes=(4, 6, 6), zero_cond_t=True
)
FLUX2_VAE = Flux2VaeConfig(channels=(4, 8, 8, 8), blocks=1, means=2, groups=4)
FLUX2 = Flux2Config(
    latent_channels=FLUX2_VAE.latent_channels,
    layers_double=1,
    layers_single=1,
    heads=2,
    head_width=16,
    context_width=48,
    rope_axes=(4, 4, 4, 4),
)
QWEN3 = Qwen3Config(vocab=400, hidden=16, layers=4, heads=2, kv_heads=1, head_width=16, mlp=24, states=(1, 2, 3))
GEMMA = Gemma2Config(
    vocab=300, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp=48, query_scalar=24.0, window=64
)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, the beginning of the sequence in front, as Gemma's tokenizer puts it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<pad>", "<bos>"])
    inner.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", len(letters) + 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", pad_token="<pad>")


def torch_network(config):
    """The network of ``config`` in torch, every parameter random."""
    import test_dit_flux
    import test_dit_qwen_image
    import test_dit_sana
    import test_dit_wan
    import test_gemma
    import test_vae_dc_ae
    import test_vae_kl
    import test_vae_wan
    import torch_support
    import vae_support

    builders = {
        SanaConfig: test_dit_sana.build,
        FluxConfig: test_dit_flux.build,
        WanConfig: test_dit_wan.build,
        QwenImageConfig: test_dit_qwen_image.build,
        Gemma2Config: test_gemma.build,
        DcAeConfig: test_vae_dc_ae.diffusers_model,
        KlConfig: test_vae_kl.diffusers_model,
        WanVaeConfig: test_vae_wan.diffusers_model,
    }
    autoencoder = isinstance(config, DcAeConfig | KlConfig | WanVaeConfig)
    randomize = vae_support.randomize if autoencoder else torch_support.randomize
    return randomize(builders[type(config)](config))


def sana_pipeline():
    """SANA with its own text encoder, as published: DPM-Solver++ with flow sigmas."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(
        tokenizer=bytes_tokenizer(),
        text_encoder=torch_network(GEMMA),
        vae=torch_network(DC_AE),
        transformer=torch_network(SANA),
        scheduler=scheduler,
    )


def flux_pipeline():
    """FLUX.1-Kontext without text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=torch_network(KL),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=torch_network(FLUX),
    )


def wan_pipeline(image: bool = False):
    """Wan2.2-TI2V without its text encoder, text to video or from a first frame."""
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": torch_network(WAN_VAE), "transformer": torch_network(WAN)}
    if image:
        parts |= {"image_encoder": None, "image_processor": None}
    return (WanImageToVideoPipeline if image else WanPipeline)(scheduler=scheduler, expand_timesteps=True, **parts)


def qwen_image_pipeline(edit: bool = False):
    """Qwen-Image, or its editing pipeline of several pictures, with its own MLLM; published schedule."""
    import diffusers
    from qwen_support import tokenizer
    from qwen_torch_support import reference_model
    from test_vae_wan import older_model
    from vae_support import randomize

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    words = tokenizer()
    words.pad_token = "<|endoftext|>"
    kind = diffusers.QwenImageEditPlusPipeline if edit else diffusers.QwenImagePipeline
    return kind(
        scheduler=scheduler,
        vae=randomize(older_model("AutoencoderKLQwenImage", WAN21_VAE)),
        text_encoder=reference_model(),
        tokenizer=words,
        transformer=torch_network(QWEN_IMAGE),
        **({"processor": None} if edit else {}),
    )


# The end of the published template, which is long because of tools.
QWEN3_CHAT = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{%- endif %}"
)


def klein_pipeline(distilled: bool = False):
    """FLUX.2 [klein] with its own text encoder; published schedule."""
    import test_dit_flux2
    import test_qwen3_text
    import test_vae_flux2
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from qwen_support import tokenizer
    from torch_support import randomize

    words = tokenizer()
    words.pad_token, words.chat_template = "<|endoftext|>", QWEN3_CHAT
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=test_vae_flux2.random_model(FLUX2_VAE),
        text_encoder=randomize(test_qwen3_text.build(QWEN3)),
        tokenizer=words,
        transformer=randomize(test_dit_flux2.build(FLUX2)),
        is_distilled=distilled,
    )


def picture(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """A random picture of bytes ``[h w 3]``."""
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), np.uint8)
