"""Pictures of tiny imported pipelines against those of diffusers' pipelines, pixel by pixel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from published_support import bytes_tokenizer, flux_pipeline, picture, sana_pipeline, wan_pipeline
from vae_support import FAST_COMPILE

from metacanvas_jax import registry
from metacanvas_jax.config.schema import SamplerSection
from metacanvas_jax.dit.flux.network import Flux, FluxConfig
from metacanvas_jax.dit.sana.network import Sana, SanaConfig
from metacanvas_jax.dit.wan.network import Wan, WanConfig
from metacanvas_jax.paint.sampling import Recipe, draw
from metacanvas_jax.text.gemma2.network import Gemma2, Gemma2Config
from metacanvas_jax.text.prompts import first_and_last, prompt_tokens
from metacanvas_jax.types import NOTHING, Given, States, Text
from metacanvas_jax.vae.dc_ae.network import DcAe, DcAeConfig
from metacanvas_jax.vae.kl.network import Kl, KlConfig
from metacanvas_jax.vae.wan.network import WanVae, WanVaeConfig
from metacanvas_jax.weights import published

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.torch

MODULES = {
    SanaConfig: Sana,
    FluxConfig: Flux,
    WanConfig: Wan,
    DcAeConfig: DcAe,
    KlConfig: Kl,
    WanVaeConfig: WanVae,
    Gemma2Config: Gemma2,
}
TOLERANCE = 1e-4  # of pixels and latents, which are of order one


def saved(pipeline, folder):
    """The pipeline without its progress bar, and the folder it was saved in."""
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder


def imported(folder, part, *arguments):
    """A network and its weights from a part of a pipeline's folder; ``arguments`` are shapes it is called with."""
    folder = published.subfolder(folder, part)
    network = MODULES[type(config := registry.published_config(folder))](config)
    if not arguments:
        arguments = (jax.ShapeDtypeStruct((1, 1, network.spatial, network.spatial, 3), jnp.float32),)
    shapes = nn.meta.unbox(jax.eval_shape(network.init, jax.random.key(0), *arguments))["params"]
    return network, registry.of(config).load(folder, config, shapes, part, progress=False)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_torch(x):
    """Videos ``[b t h w c]`` to ``[b c t h w]``."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def from_torch(x):
    return np.moveaxis(x.numpy(), 1, -1)


def close(ours, reference):
    """The largest difference is within the tolerance, and the reference is no blank."""
    assert ours.shape == reference.shape and reference.std() > 0.05
    assert np.abs(np.asarray(ours) - reference).max() <= TOLERANCE


def unit(pixels):
    """Pixels in [-1, 1] to [0, 1], as the pipelines return them."""
    return np.clip(np.asarray(pixels) / 2 + 0.5, 0, 1)


@functools.partial(jax.jit, static_argnums=(0, 6, 7), compiler_options=FAST_COMPILE)
def drawn(network, params, guide, noise, empty, first, recipe, stop=None):
    velocity = lambda z, t, c: network.apply({"params": params}, z, t, *c)  # noqa: E731
    return draw(velocity, guide, noise, recipe, empty=empty, first=first, stop=stop)


@functools.partial(jax.jit, static_argnums=(0, 3), compiler_options=FAST_COMPILE)
def through(network, params, x, method):
    return network.apply({"params": params}, x, method=method)


def arguments(network_channels, guide):
    """Shapes that a DiT is made with."""
    latents = jax.ShapeDtypeStruct((1, 1, 2, 2, network_channels), jnp.float32)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), guide)
    return latents, jax.ShapeDtypeStruct((1,), jnp.float32), *one


def test_sampler_paints_the_pictures_of_the_sana_pipeline_from_its_prompts(tmp_path):
    pipeline, folder = saved(sana_pipeline(), tmp_path)
    prompts, noise = ["A red cat", "a blue house, painted"], numbers(2, 1, 8, 16, 4)
    expected = pipeline(
        prompts,
        height=32,
        width=64,
        num_inference_steps=4,
        guidance_scale=4.5,
        latents=to_torch(noise[:, 0]),
        use_resolution_binning=False,
        clean_caption=False,
        output_type="np",
    ).images

    tokens = Text(jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), bool))
    text, text_params = imported(folder, "text_encoder", tokens)
    tokenize, pad = bytes_tokenizer().encode, bytes_tokenizer().pad_token_id

    def read(prompts, **options):
        ids, mask = (jnp.asarray(x) for x in prompt_tokens(tokenize, prompts, pad=pad, **options))
        states = jax.jit(text.apply, compiler_options=FAST_COMPILE)({"params": text_params}, Text(ids, mask))
        return first_and_last(states, 300), NOTHING

    guide, empty = read(prompts), read([""] * 2, instruction="")
    dit, params = imported(folder, "transformer", *arguments(4, guide))
    vae, vae_params = imported(folder, "vae")
    recipe = published_recipe(folder, 4, 1, 4.5)
    latents = drawn(dit, params, guide, jnp.asarray(noise), empty, None, recipe)
    close(unit(through(vae, vae_params, latents, "decode"))[:, 0], expected)


def published_recipe(folder, steps, tokens, guidance=1.0, rescale=None):
    sampler = SamplerSection(steps=steps, **registry.published_sampling(folder)._asdict())
    return Recipe(sampler.make(tokens), sampler.method, guidance, rescale)


@pytest.mark.parametrize("edited", [True, False], ids=["with_reference", "without"])
def test_sampler_paints_the_pictures_of_the_flux_kontext_pipeline(tmp_path, edited):
    pipeline, folder = saved(flux_pipeline(), tmp_path)
    noise, context, pooled = numbers(1, 1, 8, 12, 4), numbers(1, 5, 20, seed=1), numbers(1, 12, seed=2)
    source = picture(24, 16)  # smaller than the target, and of another shape
    packed = pipeline._pack_latents(to_torch(noise[:, 0]), 1, 4, 8, 12)
    given = {"image": torch.from_numpy(source / 255).permute(2, 0, 1)[None].float()} if edited else {}
    expected = pipeline(
        **given,
        height=32,
        width=48,
        max_area=32 * 48,
        num_inference_steps=4,
        guidance_scale=2.5,
        latents=packed,
        prompt_embeds=torch.from_numpy(context),
        pooled_prompt_embeds=torch.from_numpy(pooled),
        output_type="np",
        _auto_resize=False,
    ).images

    vae, vae_params = imported(folder, "vae")
    text = States(jnp.asarray(context))
    given = Given(pooled=jnp.asarray(pooled), guidance=jnp.full((1,), 2.5, jnp.float32))
    dit, params = imported(folder, "transformer", *arguments(4, (text, given)))
    if edited:
        pixels = jnp.asarray(source, jnp.float32)[None, None] / 127.5 - 1
        given = given.replace(reference=(through(vae, vae_params, pixels, "encode"),))
    latents = drawn(dit, params, (text, given), jnp.asarray(noise), None, None, published_recipe(folder, 4, 4 * 6))
    close(unit(through(vae, vae_params, latents, "decode"))[:, 0], expected)


@pytest.mark.parametrize("image", [False, True], ids=["text_to_video", "image_to_video"])
def test_sampler_paints_the_videos_and_the_trajectory_of_the_wan_pipelines(tmp_path, image):
    pipeline, folder = saved(wan_pipeline(image), tmp_path)
    noise, context, nothing = numbers(1, 3, 2, 4, 4), numbers(1, 6, 24, seed=1), numbers(1, 6, 24, seed=2)
    source = picture(32, 64)
    given = {"image": torch.from_numpy(source / 255).permute(2, 0, 1)[None].float()} if image else {}
    seen = []
    expected = pipeline(
        **given,
        height=32,
        width=64,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=5.0,
        latents=to_torch(noise),
        prompt_embeds=torch.from_numpy(context),
        negative_prompt_embeds=torch.from_numpy(nothing),
        callback_on_step_end=lambda pipe, i, t, now: seen.append(from_torch(now["latents"])) or now,
        output_type="np",
    ).frames

    guide, empty = ((States(jnp.asarray(x)), NOTHING) for x in (context, nothing))
    dit, params = imported(folder, "transformer", *arguments(4, guide))
    vae, vae_params = imported(folder, "vae")
    recipe = published_recipe(folder, 4, 1, 5.0)
    first = None
    if image:
        pixels = jnp.asarray(source, jnp.float32)[None, None] / 127.5 - 1
        first = through(vae, vae_params, pixels, "encode")
    call = functools.partial(drawn, dit, params, guide, jnp.asarray(noise), empty, first, recipe)
    for stop in (1, 4):  # the pipeline corrects the first frame at the end only
        free = slice(1, None) if image else slice(None)
        close(call(stop)[:, free], seen[stop - 1][:, free])
    close(unit(through(vae, vae_params, call(None), "decode")), expected)
