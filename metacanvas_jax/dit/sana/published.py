"""SANA as diffusers publishes it: its ``config.json`` and its scheduler."""

from typing import Any

from metacanvas_jax.dit.sana.network import SanaConfig
from metacanvas_jax.dit.schedulers import flow_solver
from metacanvas_jax.weights.published import DIFFUSERS_VERSION, Fields
from metacanvas_jax.weights.record import Sampling


def read(f: Fields) -> SanaConfig:
    """The sizes in the ``config.json`` of ``SanaTransformer2DModel``."""
    width = f("num_attention_heads") * f("attention_head_dim")
    f.only(attention_bias=False, norm_elementwise_affine=False, guidance_embeds=False, timestep_scale=1.0)
    f.among(out_channels=(f("in_channels"), None))
    f.only(cross_attention_dim=width, cross_attention_head_dim=width // f("num_cross_attention_heads"))
    norms = {None: None, "rms_norm_across_heads": "across_heads"}
    f.among(qk_norm=tuple(norms))
    f.skip("guidance_embeds_scale")  # of a network with an embedding of the guidance scale
    return SanaConfig(
        latent_channels=f("in_channels"),
        heads=f("num_attention_heads"),
        head_width=f("attention_head_dim"),
        cross_heads=f("num_cross_attention_heads"),
        layers=f("num_layers"),
        context_width=f("caption_channels"),
        mlp_ratio=float(f("mlp_ratio", 2.5)),
        patch=f("patch_size", 1),
        qk_norm=norms[f("qk_norm", None)],
        interpolation_scale=f("interpolation_scale", None),
        sample_size=f("sample_size", 32),
        eps=float(f("norm_eps", 1e-6)),
    )


def write(config: SanaConfig) -> dict[str, Any]:
    """``SanaTransformer2DModel``."""
    return {
        "_class_name": "SanaTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "num_cross_attention_heads": config.cross_heads,
        "cross_attention_head_dim": config.width // config.cross_heads,
        "cross_attention_dim": config.width,
        "num_layers": config.layers,
        "caption_channels": config.context_width,
        "mlp_ratio": config.mlp_ratio,
        "attention_bias": False,
        "sample_size": config.sample_size,
        "patch_size": config.patch,
        "norm_elementwise_affine": False,
        "norm_eps": config.eps,
        "interpolation_scale": config.interpolation_scale,
        "qk_norm": None if config.qk_norm is None else "rms_norm_across_heads",
        "guidance_embeds": False,
    }


def sampling(f: Fields) -> Sampling:
    """Schedule, method and shift of ``DPMSolverMultistepScheduler`` with flow sigmas."""
    flow_solver(f)
    f.only(algorithm_type="dpmsolver++", solver_type="midpoint", euler_at_final=False, use_lu_lambdas=False)
    f.only(variance_type=None)
    f.skip("lambda_min_clipped")  # of sigmas made from betas
    return Sampling("sana_dpm", "dpmpp_2m", float(f("flow_shift", 1.0)))
