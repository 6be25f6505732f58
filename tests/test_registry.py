"""The records of all networks: what a config, an import and an export find under them is complete and consistent."""

import json

import pytest

from metacanvas_jax import registry
from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.errors import UserError
from metacanvas_jax.trees import flat
from metacanvas_jax.weights.table import published_shapes

RECORDS = {f"{network.family}-{network.name}": network for network in registry.NETWORKS}
FIXED = {"dit-flux": {"mlp_ratio": 4}}  # what the reference knows no other value of


class Vocabulary(dict):
    """Any token has the id 7."""

    def __missing__(self, token):
        return 7


def test_names_tell_networks_of_a_family_apart():
    assert len(RECORDS) == len(registry.NETWORKS)
    published = [network.published for network in registry.NETWORKS if network.published]
    assert len(published) == len(set(published))
    for network in registry.NETWORKS:
        assert registry.family(network.family)[network.name] is network


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_knows_the_tiny_variant_of_its_network(name):
    network = RECORDS[name]
    config = network.config(**network.tiny)
    assert registry.of(config) is network
    shapes = flat(registry.abstract_params(config))
    if network.table is not None:
        entries = [*network.table(config), *network.added(config)]
        assert sorted(entry.path for entry in entries) == sorted(shapes)
        published_shapes(entries, registry.abstract_params(config))


@pytest.mark.parametrize("name", [name for name, network in RECORDS.items() if network.write is not None])
def test_a_written_config_reads_as_the_same_network(name, tmp_path):
    network = RECORDS[name]
    config = network.config(**network.tiny | FIXED.get(name, {}))
    arguments = (config,) if network.family != "mllm" else (config, Vocabulary())
    (tmp_path / "config.json").write_text(json.dumps(network.write(*arguments)))
    network.check(tmp_path, config, "network")
    assert registry.of(registry.published_config(tmp_path)) is network


@pytest.mark.parametrize("family", ["dit", "vae", "mllm", "text"])
def test_a_kind_that_no_network_has_is_refused(family):
    config = load_config("configs/t2i_scratch.py:text", [])
    config[family].kind = "nothing"
    known = ", ".join(map(repr, registry.family(family)))
    with pytest.raises(UserError, match=f"{family}.kind is 'nothing', expected one of {known}"):
        experiment(config)
