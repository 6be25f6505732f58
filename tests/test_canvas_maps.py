"""Canvas maps and the pictures people look at."""

import os

import jax
import numpy as np
import pytest
from golden_support import BACKBONES, extracted
from PIL import Image

from metacanvas_jax.cli.main import main
from metacanvas_jax.nn.resize import linear_weights
from metacanvas_jax.paint import runs
from metacanvas_jax.report import canvas_maps as canvas_maps_of
from metacanvas_jax.report import pictures
from metacanvas_jax.report.canvas_maps import canvas_maps


def plan(rng, shape, directions, noise=1e-3):
    """Features that vary along three directions of falling strength, and the coordinates along them."""
    coordinates = rng.normal(size=(*shape, 3)) * [9.0, 3.0, 1.0]
    features = coordinates @ directions + 50 + noise * rng.normal(size=(*shape, directions.shape[1]))
    return features.astype(np.float32), coordinates


@pytest.fixture(scope="module")
def planned():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(16, 3)))[0].T
    return plan(rng, (2, 3, 6, 8), directions)


def test_maps_are_the_three_strongest_components_in_order(planned):
    features, coordinates = planned
    maps = canvas_maps(features).astype(np.float64)
    assert maps.shape == (2, 3, 6, 8, 3)
    for sample in range(2):
        for component in range(3):
            shown, true = maps[sample, ..., component].ravel(), coordinates[sample, ..., component].ravel()
            assert abs(np.corrcoef(shown, true)[0, 1]) > 0.97


def test_keyframes_of_a_sample_share_their_colours():
    """Equal features get equal colours wherever and whenever they stand."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(1, 2, 4, 4, 8)).astype(np.float32)
    features[0, 1, 2, 3] = features[0, 0, 0, 1]
    maps = canvas_maps(features)
    np.testing.assert_array_equal(maps[0, 1, 2, 3], maps[0, 0, 0, 1])


def test_shared_components_compare_samples_and_own_components_do_not(planned):
    features, _ = planned
    doubled = np.concatenate([features[:1], 3 * features[1:]])
    np.testing.assert_array_equal(canvas_maps(features)[0], canvas_maps(doubled)[0])
    assert (canvas_maps(features, shared=True)[0] != canvas_maps(doubled, shared=True)[0]).any()


def test_signs_do_not_depend_on_the_order_of_the_tokens(planned):
    features, _ = planned
    flipped = canvas_maps(features[:, :, ::-1, ::-1].copy())[:, :, ::-1, ::-1]
    np.testing.assert_allclose(flipped.astype(int), canvas_maps(features).astype(int), atol=1)


def test_one_outlier_does_not_grey_out_the_rest(planned):
    features = planned[0].copy()
    features[0, 0, 0, 0] += 100 * (features[0, 0, 0, 0] - features[0].mean((0, 1, 2)))
    red = canvas_maps(features)[0, ..., 0].ravel()[1:]
    assert np.subtract(*np.percentile(red, [90, 10])) > 60


def test_features_that_do_not_vary_are_grey():
    flat = np.full((1, 1, 3, 3, 8), 2.5, np.float32)
    assert set(np.unique(canvas_maps(flat))) == {128}
    line = flat + np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3, 1)
    maps = canvas_maps(line)
    assert np.ptp(maps[..., 0]) == 255 and set(np.unique(maps[..., 1:])) == {128}


def test_fewer_channels_than_colours_still_give_a_map():
    features = np.random.default_rng(2).normal(size=(1, 1, 4, 4, 2)).astype(np.float32)
    maps = canvas_maps(features)
    assert np.ptp(maps[..., 1]) == 255 and set(np.unique(maps[..., 2])) == {128}


def test_features_that_are_not_finite_are_refused(planned):
    broken = planned[0].copy()
    broken[1, 0, 2, 2, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        canvas_maps(broken)


def test_bytes_are_rounded_and_clipped():
    values = np.array([-1.5, -1.0, -0.5, 0.0, 0.9999, 1.0, 7.0], np.float32)
    np.testing.assert_array_equal(pictures.to_uint8(values), [0, 0, 64, 128, 255, 255, 255])
    every = np.arange(256)
    np.testing.assert_array_equal(pictures.to_uint8((every / 127.5 - 1).astype(np.float32)), every)
    with pytest.raises(ValueError, match="not finite"):
        pictures.to_uint8(np.array([np.inf], np.float32))


def test_upscaling_repeats_pixels_by_a_whole_factor():
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    large = pictures.upscale(picture, 7)
    assert large.shape == (8, 12, 3)
    np.testing.assert_array_equal(large[::4, ::4], picture)
    np.testing.assert_array_equal(pictures.upscale(picture, 2), picture)


def test_sheet_holds_every_picture_with_its_verdict():
    tiles = [np.full((10, 10, 3), shade, np.uint8) for shade in (40, 90, 140)]
    sheet = pictures.grid(
        tiles, ["a", "a longer caption that has to be wrapped", "c"], 2, right=[True, False, None], least=20
    )
    for shade in (40, 90, 140):
        assert (sheet == shade).all(-1).sum() == 400
    ring = 26**2 - 20**2
    assert (sheet == pictures.RIGHT).all(-1).sum() == ring
    assert (sheet == pictures.WRONG).all(-1).sum() == ring
    left = np.argwhere((sheet == 140).all(-1)).min(0)
    assert (left == np.argwhere((sheet == 40).all(-1)).min(0))[1]  # the third picture starts the second row
    bare = pictures.grid(tiles, columns=3, least=20)
    assert bare.shape[0] < sheet.shape[0]


def test_sheet_refuses_what_does_not_fit_together():
    tile = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="at least one picture"):
        pictures.grid([])
    with pytest.raises(ValueError, match="differ in size"):
        pictures.grid([tile, np.zeros((4, 5, 3), np.uint8)])
    with pytest.raises(ValueError, match="1 captions for 2 pictures"):
        pictures.grid([tile, tile], ["one"])
    with pytest.raises(ValueError, match="3 verdicts for 2 pictures"):
        pictures.grid([tile, tile], right=[True, False, None])


def test_png_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    first = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    pictures.save_png(first, path)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), first)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pictures.save_png(255 - first, path)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), first)


def test_keyframes_stand_where_the_canvas_is_stretched_to_them():
    """There the stretched canvas is made of this keyframe more than of any other."""
    assert canvas_maps_of.keyframes(31, 3) == [5, 15, 25] and canvas_maps_of.keyframes(2, 3) == [0, 1]
    for latents, count in ((31, 3), (5, 2), (7, 7), (1, 1)):
        weights = linear_weights(count, latents)
        for keyframe, latent in enumerate(canvas_maps_of.keyframes(latents, count)):
            assert weights[latent, keyframe] > 0.5 and weights[latent].argmax() == keyframe
    assert [canvas_maps_of.shown_at(latent, 31, 121) for latent in (0, 1, 30)] == [0, 4, 120]


def test_a_row_has_the_frame_and_the_map_of_each_keyframe(planned):
    features = planned[0][:1]  # three latent frames of 6 x 8
    video = np.arange(9, dtype=np.uint8)[None, :, None, None, None] * np.ones((1, 1, 12, 16, 3), np.uint8)
    maps = canvas_maps(features)[0]
    (row,) = canvas_maps_of.rows(video, features, 2)
    assert row.shape == (12, 4 * 16, 3)
    for place, latent in enumerate((0, 2)):
        assert (row[:, 32 * place : 32 * place + 16] == 4 * latent).all()
        np.testing.assert_array_equal(row[::2, 32 * place + 16 : 32 * place + 32 : 2], maps[latent])


def test_a_gif_shows_every_frame_beside_the_map_of_its_latent_frame(planned, tmp_path):
    features = planned[0][:1]
    video = np.arange(9, dtype=np.uint8)[None, :, None, None, None] * np.ones((1, 1, 12, 16, 3), np.uint8)
    maps, (shown,) = canvas_maps(features)[0], canvas_maps_of.moving(video, features)
    assert shown.shape == (9, 12, 32, 3)
    for number, latent in enumerate((0, 1, 1, 1, 1, 2, 2, 2, 2)):  # one frame, then four by four
        assert (shown[number, :, :16] == number).all()
        np.testing.assert_array_equal(shown[number, ::2, 16::2], maps[latent])
    (tmp_path / "maps.gif").write_bytes(pictures.gif(list(shown), 8.0))
    with Image.open(tmp_path / "maps.gif") as opened:
        assert opened.n_frames == 9 and opened.info["loop"] == 0 and opened.info["duration"] == 120
        opened.seek(8)
        first = np.asarray(opened.convert("RGB")).astype(int)
    assert np.abs(first - shown[8]).mean() < 8  # a palette of 256 colours


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return extracted(tmp_path_factory.mktemp("older"))


@pytest.fixture
def quick():
    """Compiles without optimising: the networks are tiny."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_maps_of_a_run_of_every_backbone(folders, backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    call = ["maps", "--run", f"{backbone}/run", "--prompt", "a red cat", "--prompt", "a car", "--steps", "2"]
    video = ["--frames", "5"] if backbone == "wan" else []
    assert main([*call, *video, "--out", str(tmp_path / "maps.png")]) == 0
    sheet, shown = np.asarray(Image.open(tmp_path / "maps.png")), 4 if video else 2
    assert sheet.shape[1] > shown * 60 and sheet[:, -80:].std() > 20, "a map for each of the keyframes"
    capsys.readouterr()
    assert main([*call, "--out", str(tmp_path / "maps.gif")]) == 2, "a picture does not move"
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "expected a .png file" in line
    if video:
        assert main([*call, *video, "--fps", "4", "--out", str(tmp_path / "maps.gif")]) == 0
        with Image.open(tmp_path / "maps.gif") as opened:
            assert opened.n_frames == 5 and opened.info["duration"] == 250


@pytest.mark.usefixtures("quick")
def test_a_film_of_the_sampling_ends_with_the_picture(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    trained = runs.load(folders / "sana" / "run")
    drawn = trained.draw(["a red cat"], steps=2, seed=3)
    film = trained.draw(["a red cat"], steps=2, seed=3, moments=3)
    assert film.pixels.shape[1] == film.canvas.shape[1] == 3
    assert np.abs(film.pixels[:, -1].astype(int) - drawn.pixels[:, 0]).max() <= 1
    for earlier, later in ((0, 1), (1, 2)):
        assert (film.pixels[:, earlier] != film.pixels[:, later]).any()
    call = ["maps", "--run", "sana/run", "--prompt", "a red cat", "--steps", "2", "--moments"]
    assert main([*call, "1"]) == 2 and "expected 2 or more" in capsys.readouterr().err
    assert main([*call, "3", "--out", str(tmp_path / "film.gif")]) == 0
    with Image.open(tmp_path / "film.gif") as opened:
        assert opened.n_frames == 3
