"""What a drawing writes: where, under which name, for which seed, and what is said when it cannot be written."""

import errno
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax import files
from metacanvas_jax.cli import drawing
from metacanvas_jax.cli.main import main
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.errors import UserError
from metacanvas_jax.exchange import model_card
from metacanvas_jax.launch.training import warned
from metacanvas_jax.miniature import teaching
from metacanvas_jax.paint.one_shape import OneShape, compiled
from metacanvas_jax.paint.painter import NonFinitePixels, noise_key, to_bytes
from metacanvas_jax.plan import planning


def asked(**changes):
    defaults = dict.fromkeys(("count", "steps", "frames", "tile", "fps", "guidance", "out"))
    return SimpleNamespace(**(defaults | {"seed": 0, "prompt": "x", "run": None} | changes))


def test_every_seed_has_its_own_noise():
    seeds = (0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1)
    assert len({jax.random.key_data(noise_key(seed)).tobytes() for seed in seeds}) == len(seeds)
    assert noise_key(7) == jax.random.key(7)  # pictures of the seeds that people have used stay the same


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(UserError, match=r"--seed is .*, expected a number from 0 to 18446744073709551615"):
        drawing.check(asked(seed=seed))
    with pytest.raises(UserError, match="the seed is"):
        noise_key(seed)


@pytest.mark.parametrize("guidance", [float("nan"), float("inf"), -float("inf")])
def test_a_guidance_that_is_no_number_is_refused(guidance):
    with pytest.raises(UserError, match=r"--guidance is .*, expected a finite number"):
        drawing.check(asked(guidance=guidance))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_pixels_that_are_not_finite_are_an_error(bad):
    pixels = jnp.zeros((1, 1, 2, 2, 3)).at[0, 0, 1, 1, 0].set(bad)
    with pytest.raises(NonFinitePixels, match="1 of 12 values"):
        to_bytes(pixels)
    np.testing.assert_array_equal(to_bytes(jnp.asarray([-2.0, -1.0, 0.0, 1.0, 2.0])), [0, 0, 128, 255, 255])


def test_of_a_group_that_is_drawn_only_what_is_asked_for_must_be_finite():
    def paint(params, batch, blank, key):
        return SimpleNamespace(pixels=jnp.zeros((2, 1, 2, 2, 3)).at[1, 0, 1, 1, 0].set(jnp.nan))

    empty = {"tokens": jnp.zeros((2, 1)), "positions": jnp.zeros((2, 3, 1)), "mask": jnp.zeros((2, 1))}
    pending = [compiled(paint)({}, {}, empty, np.zeros((2, 2), np.uint32), jax.random.key(0))]
    drawing = SimpleNamespace(_each=2)
    (first,) = OneShape.fetch(drawing, pending, [1])  # the second fills up the group
    np.testing.assert_array_equal(first, np.full((1, 1, 2, 2, 3), 128, np.uint8))
    with pytest.raises(NonFinitePixels, match="a result holds values that are not finite"):
        OneShape.fetch(drawing, pending, [2])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_report_with_a_seed_that_is_none_is_refused_before_the_run_is_looked_at(seed, tmp_path, capsys):
    assert main(["report", "--run", str(tmp_path / "nowhere"), "--draw", f"--seed={seed}"]) == 2
    assert f"--seed is {seed}, expected a number from 0 to" in capsys.readouterr().err


def test_a_preview_that_is_not_finite_does_not_end_a_training(caplog):
    with warned("the preview", 7):
        to_bytes(jnp.full((2,), jnp.nan))
    assert "step 7: the preview was left out: 2 of 2 values" in caplog.text


@pytest.mark.parametrize("prompt", ["\N{CAT FACE}" * 300, "日本語の猫" * 100, "a" * 1000, "!?"])
def test_a_name_after_any_prompt_can_be_written(prompt, tmp_path):
    path = drawing.place(asked(run=tmp_path), prompt, video=False)
    files.write(path, b"x")
    assert path.read_bytes() == b"x"
    assert drawing.place(asked(run=tmp_path), prompt, video=False).stem == f"{path.stem}-2"


def test_a_picture_that_was_named_is_replaced_with_a_word(tmp_path, capsys):
    for said in ("", f"{tmp_path}/a.png is replaced\n"):
        assert drawing.place(asked(out=tmp_path / "a.png"), "a cat", video=False) == tmp_path / "a.png"
        assert capsys.readouterr().err == said
        (tmp_path / "a.png").write_bytes(b"x")


def test_a_place_that_cannot_be_written_is_said_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    for place, said in (
        (tmp_path / "file" / "x.png", "file is no folder"),
        (tmp_path, "it is a folder"),
        (tmp_path / ("a" * 300 + ".png"), "a name of 304 bytes is too long"),
    ):
        with pytest.raises(UserError, match=f"cannot write .*{said}"):
            files.check_writable(place)
    files.check_writable(tmp_path / "new" / "deep" / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_said_before_a_plan_or_a_teaching(tmp_path):
    (tmp_path / "file").write_text("")
    for work in (lambda out: planning.plan("none", None, out=out), lambda out: teaching.teach(None, tmp_path, out)):
        with pytest.raises(UserError, match=r"cannot write .*file is no folder"):
            work(tmp_path / "file" / "out")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        files.write(tmp_path / "x.png", b"x")
    assert not list(tmp_path.iterdir())


def test_a_card_names_data_and_not_the_folders_of_a_machine():
    kinds = {"files": "/home/someone/cats", "webdataset": "/mnt/disk/laion/*.tar", "csv": "gs://bucket/private/a.csv"}
    sources = [SourceSection(kind, path, "text_to_image") for kind, path in kinds.items()]
    for path, named in {"": "", "/data/scenes": " in `scenes`"}.items():
        scenes = SimpleNamespace(sources=(), data=SimpleNamespace(path=path, count=1000))
        assert model_card._data(scenes) == f"1,000 OpenMoji scenes{named}"
    said = model_card._data(SimpleNamespace(sources=sources))
    assert said == "; ".join(f"text_to_image: {x}" for x in ("files `cats`", "webdataset `laion/*.tar`", "csv `a.csv`"))
    assert next(iter(model_card._data_licences(SimpleNamespace(sources=sources))))[0] == "data of `cats`"
