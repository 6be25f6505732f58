"""The table of chips and the names of slices."""

import pytest

from metacanvas_jax.errors import UserError
from metacanvas_jax.hardware import CHIPS, TPUS, chip_of, slice_name


def test_every_device_kind_belongs_to_one_chip():
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    assert [chip_of(kind).name for kind in ("TPU v5 lite", "TPU v5", "TPU7x")] == ["v5e", "v5p", "tpu7x"]
    assert chip_of("NVIDIA H100 80GB HBM3").flops == 989e12
    assert chip_of("cpu") is None


def test_figures_of_tpus_are_complete():
    assert TPUS == ("v4", "v5e", "v5p", "v6e", "tpu7x")
    for chip in (CHIPS[name] for name in TPUS):
        assert min(chip.flops, chip.hbm, chip.hbm_bandwidth, chip.vmem, chip.clock, chip.link, chip.network) > 0
        assert chip.ring == 2 * chip.link


@pytest.mark.parametrize(
    ("name", "chips", "devices", "words"),
    [
        ("v6e:8x8", 64, 64, "64 TPU v6e chips (8x8)"),
        ("v5p:4x4x4*2", 128, 128, "128 TPU v5p chips (2 x 4x4x4)"),
        ("tpu7x:2x2x1", 4, 8, "4 TPU 7x chips (2x2x1)"),
    ],
)
def test_a_slice_is_counted_from_its_name(name, chips, devices, words):
    found = slice_name(name)
    assert (found.chips, found.devices, str(found)) == (chips, devices, words)


@pytest.mark.parametrize("name", ["", "v5p", "v5p:8", "v9:4x4", "h100:4x4", "v5e:4x4*", "v5e:4xx4"])
def test_a_wrong_name_is_one_line_with_examples(name):
    with pytest.raises(UserError, match="is no name of a TPU slice; expected GENERATION:SIZE, as in v5e:4x4") as caught:
        slice_name(name)
    assert "\n" not in str(caught.value)
