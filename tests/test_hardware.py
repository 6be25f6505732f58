"""The table of chips and the names of slices."""

import pytest

from metacanvas_jax.errors import UserError
from metacanvas_jax.hardware import CHIPS, TPUS, chip_of, platforms, slice_name


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


@pytest.mark.parametrize(
    ("name", "hosts", "machine", "accelerator"),
    [  # docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x: the tables of VMs per slice
        *(("v6e:1x1", 1, "ct6e-standard-1t", "v6e-1"), ("v6e:2x2", 1, "ct6e-standard-4t", "v6e-4")),
        *(("v6e:2x4", 1, "ct6e-standard-8t", "v6e-8"), ("v6e:4x4", 4, "ct6e-standard-4t", "v6e-16")),
        *(("v6e:4x8", 8, "ct6e-standard-4t", "v6e-32"), ("v6e:8x8", 16, "ct6e-standard-4t", "v6e-64")),
        *(("v6e:8x16", 32, "ct6e-standard-4t", "v6e-128"), ("v6e:16x16", 64, "ct6e-standard-4t", "v6e-256")),
        *(("v5e:1x1", 1, "ct5lp-hightpu-1t", "v5litepod-1"), ("v5e:2x4", 1, "ct5lp-hightpu-8t", "v5litepod-8")),
        *(("v5e:4x4", 4, "ct5lp-hightpu-4t", "v5litepod-16"), ("v5e:16x16", 64, "ct5lp-hightpu-4t", "v5litepod-256")),
        *(("v5p:2x2x1", 1, "ct5p-hightpu-4t", "v5p-8"), ("v5p:2x2x2", 2, "ct5p-hightpu-4t", "v5p-16")),
        *(("v5p:4x4x8", 32, "ct5p-hightpu-4t", "v5p-256"), ("v4:2x2x4", 4, "ct4p-hightpu-4t", "v4-32")),
        *(("tpu7x:2x2x1", 1, "tpu7x-standard-4t", "tpu7x-8"), ("v6e:4x4*3", 12, "ct6e-standard-4t", "v6e-16")),
    ],
)
def test_hosts_of_a_slice_are_those_of_the_published_table(name, hosts, machine, accelerator):
    found = slice_name(name)
    assert (found.hosts, found.machine.name, found.accelerator) == (hosts, machine, accelerator)


@pytest.mark.parametrize("name", ["v6e:3x3", "v5p:4x4", "v5p:8x4x4", "v5e:32x32", "v4:1x1x1"])
def test_a_size_that_is_not_offered_is_named_with_those_that_are(name):
    with pytest.raises(UserError, match=f"{name} is not offered; the sizes of"):
        slice_name(name).hosts  # noqa: B018


@pytest.mark.parametrize(
    ("files", "expected"),
    [((), "cpu"), (("accel0",), None), (("vfio/0",), None), (("nvidia0",), None), (("vfio/vfio",), "cpu")],
)
def test_libtpu_is_left_alone_where_there_is_no_tpu(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert platforms(tmp_path) == expected
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert platforms(tmp_path) is None
