"""What is kept out of the training: by the hash of its name, whatever else lies beside it."""

import numpy as np
import pytest
from sources_support import encoded, pairs, write_rows, write_tar

from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data.sources import open_source
from metacanvas_jax.data.split import Part, place, split, validated
from metacanvas_jax.errors import UserError


def _opened(kind, path, **options):
    return open_source(SourceSection(kind, str(path), **options))


def _names(part):
    return {part[i].name for i in range(len(part))}


def test_split_gives_every_record_to_one_part_about_as_large_as_asked(tmp_path):
    source = _opened("webdataset", write_tar(tmp_path / "a.tar", pairs(200)))
    train, held = split(source, 0.2, False), split(source, 0.2, True)
    assert 20 <= len(held) <= 60 and len(train) + len(held) == 200
    assert not _names(train) & _names(held)
    assert split(source, 0.0, False) is source


def test_split_moves_nothing_when_records_are_added_or_reordered(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    rows = [{"file_name": f"{number}.png", "text": f"caption {number}"} for number in range(60)]
    write_rows(tmp_path, rows[:40])
    before = {sample.prompt for sample in split(_opened("jsonl", tmp_path), 0.25, True)}
    write_rows(tmp_path, rows[::-1])
    after = {sample.prompt for sample in split(_opened("jsonl", tmp_path), 0.25, True)}
    assert before == {prompt for prompt in after if int(prompt.split()[1]) < 40} and before


def test_split_of_few_records_keeps_at_least_one_out(tmp_path):
    for count in range(2, 12):
        source = _opened("webdataset", write_tar(tmp_path / f"{count}.tar", pairs(count)))
        assert 1 <= len(validated(source, 0.001)) < count
    alone = _opened("webdataset", write_tar(tmp_path / "one.tar", pairs(1)))
    with pytest.raises(UserError, match=r"of 1 samples, a validation share of 0\.05 leaves none to train on"):
        split(alone, 0.05, False)


def test_split_replaces_a_bad_record_by_one_of_its_own_part(tmp_path):
    members = pairs(60)
    source = _opened("webdataset", write_tar(tmp_path / "good.tar", members))
    chosen = validated(source, 0.3)
    bad = {f"{chosen[2]:06d}.png", f"{chosen[3]:06d}.png"}
    damaged = [(name, b"damaged" if name in bad else data) for name, data in members]
    again = open_source(SourceSection("webdataset", str(write_tar(tmp_path / "good.tar", damaged)), max_skips=2))
    held = split(again, 0.3, True)
    assert isinstance(held, Part) and held[2].name == held[4].name
    assert {int(name[-6:]) for name in _names(held)} == set(chosen) - {chosen[2], chosen[3]}


def test_split_is_by_a_hash_that_no_version_changes():
    np.testing.assert_allclose(
        [place("a/1"), place("a/2"), place("")], [0.9232828471, 0.3383286142, 0.8666040915], rtol=0, atol=1e-10
    )
