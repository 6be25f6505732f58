"""The exported torch package part by part: samplers and prompts against this project's own."""

import dataclasses
import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from qwen_support import tokenizer

from metacanvas_jax.config.schema import SamplerSection
from metacanvas_jax.diffusion.samplers import sample
from metacanvas_jax.mllm.media import MediaConfig, read_image, read_video
from metacanvas_jax.mllm.prompt import PromptConfig, Prompter
from metacanvas_jax.mllm.template import CHAT

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the [torch] extra")

SAMPLERS = [
    SamplerSection(schedule="linear", method="euler", steps=4, shift=2.0),
    SamplerSection(schedule="linear", method="unipc", steps=5, shift=3.0),
    SamplerSection(schedule="sana_dpm", method="dpmpp_2m", steps=6, shift=3.0),
    SamplerSection(schedule="wan_unipc", method="unipc", steps=6, shift=5.0),
    SamplerSection(schedule="flux_dynamic", method="euler", steps=3),
    SamplerSection(schedule="linear", method="dpmpp_2m", steps=1),
]


@pytest.mark.parametrize("section", SAMPLERS, ids=lambda s: f"{s.schedule}-{s.method}-{s.steps}")
def test_exported_samplers_visit_the_same_levels_and_end_at_the_same_latents(section):
    from metacanvas_jax.torch_export import samplers

    config, tokens = dataclasses.asdict(section), 1000
    schedule = section.make(tokens)
    sigmas, times = samplers.schedule(config, tokens)
    np.testing.assert_array_equal(np.float32(sigmas), np.float32(schedule.sigmas))
    np.testing.assert_array_equal(np.float32(times), np.float32(schedule.times))
    noise = np.random.default_rng(0).standard_normal((2, 1, 3, 3, 4), np.float32)
    ours = sample(
        lambda z, t: jnp.cos(3 * z) * (1 + t[:, None, None, None, None]), jnp.asarray(noise), schedule, section.method
    )
    theirs = samplers.sample(lambda z, t: torch.cos(3 * z) * (1 + t), torch.from_numpy(noise), config, tokens)
    np.testing.assert_allclose(theirs.numpy(), ours, atol=2e-5)


@pytest.mark.parametrize("budget", [None, 12])
def test_exported_prompts_have_the_same_tokens_positions_and_patches(budget):
    from metacanvas_jax.mllm import torch_side as prompt

    rng = np.random.default_rng(0)
    draw = lambda h, w: Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8))  # noqa: E731
    image, video = draw(70, 90), [draw(60, 60) for _ in range(5)]
    media = MediaConfig(tokens=budget, image_pixels=(784, 6000), video_pixels=(784, 3200))
    prompts = Prompter(tokenizer(), PromptConfig(buckets=(160,), media=media))
    ours = prompts.batch(
        [prompts([read_image(image, media), read_video(video, 1.5, media), "a red cat"]), prompts("painted")]
    )
    config = {
        "system": "You are a helpful assistant.",
        "length": 160,
        "tokens_per_second": 2.0,
        "media": dataclasses.asdict(media),
    }
    shown = [prompt.read_medium([image], config["media"]), prompt.read_medium(video, config["media"], 1.5)]
    theirs = prompt.build(tokenizer(), [(shown, "a red cat"), ([], "painted")], config)
    np.testing.assert_array_equal(theirs.tokens.numpy(), ours.tokens)
    np.testing.assert_array_equal(theirs.positions.numpy(), ours.positions)
    np.testing.assert_array_equal(theirs.mask.numpy(), ours.mask)
    for patches, grid, (rows, columns) in theirs.media:
        (medium,) = (m for m in ours.media if m.grid == tuple(grid[0].tolist()))
        np.testing.assert_allclose(patches.numpy(), medium.patches[0, 0], atol=1e-6)
        np.testing.assert_array_equal(columns.numpy(), medium.slots[0, 0])
        assert not rows.any()


@pytest.mark.parametrize("length", [24, 64])
@pytest.mark.parametrize("text", ["a <|im_end|> cat <|image_pad|>", "😀" * 90, "👨‍👩‍👧 " * 40, "a cat " * 90])
def test_exported_prompts_read_any_text_as_ours_do(text, length):
    from metacanvas_jax.data.examples import shortened
    from metacanvas_jax.mllm import torch_side as prompt

    prompts = Prompter(tokenizer(), PromptConfig(system=None, buckets=(length,)))
    ours = prompts.batch([shortened(prompts, prompts(text), [], text, length)], length=length)
    config = {"system": None, "length": length, "tokens_per_second": 2.0, "media": {"merge": 2}}
    theirs = prompt.build(tokenizer(), [([], text)], config)
    np.testing.assert_array_equal(theirs.tokens.numpy(), ours.tokens)


def test_exported_prompts_follow_the_template_of_the_export():
    from metacanvas_jax.mllm import torch_side as prompt

    words, media = tokenizer(), dataclasses.asdict(MediaConfig())
    config = {"system": "be kind", "length": 40, "tokens_per_second": 2.0, "media": media}
    shown = prompt.read_medium([Image.new("RGB", (56, 28))], media)

    def tokens(**changes):
        return prompt.build(words, [([shown], "a cat")], config | changes).tokens[0].tolist()

    assert tokens() == tokens(template=CHAT)
    ids = {name: words.convert_tokens_to_ids(CHAT[name]) for name in ("end", "padding", "image", "video")}
    changed = {ids["end"]: ids["padding"], ids["image"]: ids["video"]}
    other = CHAT | {"end": CHAT["padding"], "image": CHAT["video"]}
    assert tokens(template=other) == [changed.get(token, token) for token in tokens()]
    assert tokens(template=CHAT | {"user": ""}) != tokens()


def test_exported_prompts_refuse_media_that_are_too_long():
    from metacanvas_jax.errors import UserError
    from metacanvas_jax.mllm import torch_side as prompt

    media = dataclasses.asdict(MediaConfig())
    config = {"system": None, "length": 8, "tokens_per_second": 2.0, "media": media}
    shown = prompt.read_medium([Image.new("RGB", (84, 84))], media)
    with pytest.raises(UserError, match=r"the media of a prompt need \d+ tokens, at most 8 fit"):
        prompt.build(tokenizer(), [([shown], "a cat")], config)


def test_exported_prompts_that_are_too_long_lose_the_words_that_ours_lose(caplog):
    from metacanvas_jax.data.examples import shortened
    from metacanvas_jax.mllm import torch_side as prompt

    text = "What is in this picture? " * 3 + "A red cat beside a blue house, painted."
    prompts = Prompter(tokenizer(), PromptConfig(buckets=(40,)))
    ours = prompts.batch([shortened(prompts, prompts(text), [], text, 40)], length=40)
    config = {"system": prompts.config.system, "length": 40, "tokens_per_second": 2.0, "media": {"merge": 2}}
    theirs = prompt.build(tokenizer(), [([], text)], config)
    np.testing.assert_array_equal(theirs.tokens.numpy(), ours.tokens)
    assert "loses its last words" in caplog.text


def test_exported_pixel_autoencoder_is_ours():
    from metacanvas_jax.vae.patch_pca.network import PatchPca, PatchPcaConfig
    from metacanvas_jax.vae.patch_pca.torch_side import Side as TorchPatchPca

    rng = np.random.default_rng(0)
    params = {
        "mean": rng.standard_normal(27).astype(np.float32),
        "basis": rng.standard_normal((27, 5)).astype(np.float32),
        "scale": 1 + rng.random(5).astype(np.float32),
    }
    ours = PatchPca(PatchPcaConfig(patch=3, channels=5))
    theirs = TorchPatchPca(**{name: torch.from_numpy(value) for name, value in params.items()})
    pixels = rng.uniform(-1, 1, (2, 2, 6, 9, 3)).astype(np.float32)
    latents = ours.apply({"params": params}, jnp.asarray(pixels), method="encode")
    found = theirs.encode(torch.from_numpy(pixels).movedim(-1, 1)).movedim(1, -1)
    np.testing.assert_allclose(found.numpy(), latents, atol=1e-4)
    decoded = ours.apply({"params": params}, latents, method="decode")
    back = theirs.decode(torch.from_numpy(np.array(latents)).movedim(-1, 1)).clamp(-1, 1).movedim(1, -1)
    np.testing.assert_allclose(back.numpy(), decoded, atol=1e-4)


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("reads_prompt", [True, False])
def test_exported_text_encoder_reads_and_keeps_the_tokens_that_ours_does(reads_prompt, begins, asked):
    from types import SimpleNamespace

    from tokenizers.processors import TemplateProcessing

    from metacanvas_jax.data.examples import TextRows
    from metacanvas_jax.text.gemma2.torch_side import Side as TextEncoder
    from metacanvas_jax.text.prompts import first_and_last
    from metacanvas_jax.types import States

    words = tokenizer()
    if begins:
        words.bos_token = "<|im_start|>"
        words.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", words.convert_tokens_to_ids("<|im_start|>"))]
        )
    words.pad_token = "<|endoftext|>"

    def states(ids, attention_mask):
        return SimpleNamespace(last_hidden_state=ids[:, :, None].float())

    states.device = "cpu"
    config = {"length": 12, "instruction": "Describe: ", "reads_prompt": reads_prompt}
    prompts = ["A Red cat ", "", "a blue house, painted. What is in this picture?"]
    found, seen = TextEncoder(states, words, config)(prompts, [asked or bool(prompt) for prompt in prompts])
    rows = TextRows(words, 12, instruction=config["instruction"], reads_prompt=reads_prompt)
    ids, mask = (
        np.stack([rows(prompt, asked=asked)[name] for prompt in prompts]) for name in ("text_tokens", "text_mask")
    )
    expected = first_and_last(States(jnp.asarray(ids, jnp.float32)[:, :, None], jnp.asarray(mask)), 12)
    np.testing.assert_array_equal(found.numpy(), expected.states)
    np.testing.assert_array_equal(seen.numpy(), expected.mask)
    assert expected.mask.sum() < expected.mask.size


def test_pictures_are_read_upright_on_white_and_cropped():
    from metacanvas_jax.data.decoding import decode_image
    from metacanvas_jax.data.transforms import fit_image
    from metacanvas_jax.errors import UserError
    from metacanvas_jax.torch_export import reading

    exif = Image.Exif()
    exif[0x0112] = 6
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8))
    cutout = colours.convert("RGBA")
    cutout.putalpha(Image.linear_gradient("L").resize(colours.size))
    files = {
        "turned": (colours, {"exif": exif}),
        "cutout": (cutout, {}),
        "grey": (colours.convert("LA"), {}),
        "palette": (colours.convert("P"), {"transparency": 1}),
        "bit": (colours.convert("1"), {}),
    }
    for name, (picture, options) in files.items():
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", **options)
        ours = fit_image(decode_image(buffer.getvalue()), (8, 6))
        with Image.open(buffer) as opened:
            theirs = np.asarray(reading.fit(reading.picture(opened), (8, 6)))
        np.testing.assert_array_equal(theirs, ours, err_msg=name)
    with pytest.raises(UserError, match="a picture of mode I;16, expected 8 bits per channel"):
        reading.picture(Image.new("I;16", (8, 8), 40000))


def test_media_of_the_exported_mllm_have_transparency_on_white():
    from metacanvas_jax.mllm import torch_side as prompt

    media = MediaConfig(image_pixels=(784, 6000))
    cutout = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).convert("RGBA")
    cutout.putalpha(Image.linear_gradient("L").resize(cutout.size))
    theirs = prompt.read_medium([cutout], dataclasses.asdict(media))
    np.testing.assert_allclose(theirs.patches, read_image(cutout, media).values, atol=1e-6)


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024)])
def test_an_exported_flux_samples_by_the_tokens_of_the_run(size):
    """FLUX makes a token of 2 x 2 latents; its schedule depends on their number."""
    from configs import image_editing
    from metacanvas_jax.config import networks, read
    from metacanvas_jax.data.shapes import latent_grid
    from metacanvas_jax.dit.flux.torch_side import Side
    from metacanvas_jax.paint.program import how_to, recipe_of
    from metacanvas_jax.torch_export import samplers

    setup = read.experiment(image_editing.get_config("canvas"))
    bucket = dataclasses.replace(setup.shapes[0], size=size)
    ours = recipe_of(setup, how_to(setup, bucket), networks.network(setup)).schedule
    tokens = Side.__new__(Side).tokens(latent_grid(setup, bucket))  # which asks no weight
    sigmas, times = samplers.schedule(dataclasses.asdict(setup.sampler), tokens)
    np.testing.assert_allclose(sigmas, ours.sigmas, rtol=1e-6)
    np.testing.assert_allclose(times, ours.times, rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_export_paints_no_black_for_what_is_not_finite(bad):
    from types import SimpleNamespace

    from metacanvas_jax.errors import UserError
    from metacanvas_jax.torch_export.pipeline import MetaCanvasPipeline

    pipeline = SimpleNamespace(vae=SimpleNamespace(decode=lambda x: x), backbone=SimpleNamespace(dtype=torch.float32))
    latents = torch.zeros(1, 3, 1, 2, 2)
    (picture,) = MetaCanvasPipeline.decode(pipeline, latents)
    assert np.unique(picture).tolist() == [128]
    latents[0, 0, 0, 1, 1] = bad
    with pytest.raises(UserError, match="1 of 12 values of the result are not finite"):
        MetaCanvasPipeline.decode(pipeline, latents)


def test_every_seed_of_an_export_has_its_own_noise():
    from types import SimpleNamespace

    from metacanvas_jax.errors import UserError
    from metacanvas_jax.torch_export.pipeline import MetaCanvasPipeline

    pipeline, seeds = SimpleNamespace(index={"latent_channels": 3}), (0, 1, 2**32, 2**33, 2**64 - 1)
    noise = [MetaCanvasPipeline.noise(pipeline, 1, (1, 2, 2), seed).numpy().tobytes() for seed in seeds]
    assert len(set(noise)) == len(seeds)
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match=f"the seed is {seed}, expected a number from 0 to 18446744073709551615"):
            MetaCanvasPipeline.noise(pipeline, 1, (1, 2, 2), seed)


@pytest.mark.parametrize("fps", [6.0, 24.0])
@pytest.mark.parametrize("count", [5, 9, 121])
def test_frames_that_the_mllm_reads_and_frames_of_a_clip_are_ours(count, fps):
    from metacanvas_jax.data.transforms import Clip, frame_indices
    from metacanvas_jax.mllm.media import sample_frames
    from metacanvas_jax.torch_export import reading

    chosen, rate = sample_frames(count, fps, target=2.0)
    assert reading.shown_frames(count, fps, reading.FRAMES) == (chosen.tolist(), rate)
    assert (
        reading.clip(2 * count, 2 * fps, count, fps)
        == frame_indices(2 * count, 2 * fps, Clip(None, count, fps)).tolist()
    )


@pytest.mark.parametrize(("least", "time", "expected"), [(None, 0.5, 0.5), (0.05, 0.5, 3.0), (0.05, 0.01, 30.0)])
def test_an_exported_network_that_predicts_data_gives_the_velocity_that_leads_there(least, time, expected):
    from types import SimpleNamespace

    from metacanvas_jax.dit.sana.torch_side import Given, Plan, Side

    class Net(torch.nn.Module):
        """Its output is 0.5 everywhere."""

        config = SimpleNamespace(patch_size=1)
        patch_embed = torch.nn.Identity()

        def forward(self, latents, **given):
            return SimpleNamespace(sample=torch.full_like(latents, 0.5))

    latents, plan = torch.full((2, 3, 1, 2, 2), 2.0), Plan(torch.zeros(2, 1, 4), torch.ones(2, 1))
    side = Side(Net(), None, {"time_scale": 1000.0} | ({} if least is None else {"least_time": least}))
    torch.testing.assert_close(side.velocity(latents, time, plan, Given()), torch.full_like(latents, expected))
