"""A change of rules, names or sizes that moves a parameter of a shipped config shows as a difference of text."""

import difflib

import pytest
import sharding_golden as golden


def test_every_shipped_config_and_mesh_has_its_file():
    assert sorted(path.stem for path in golden.FOLDER.glob("*.txt")) == sorted(golden.CASES)


@pytest.mark.parametrize("case", golden.CASES)
def test_parameters_lie_where_they_lay(case):
    known = (golden.FOLDER / f"{case}.txt").read_text().splitlines()
    found = golden.parameters(golden.CASES[case])
    difference = "\n".join(difflib.unified_diff(known, found, f"golden/sharding/{case}.txt", "now", n=0, lineterm=""))
    if difference:
        pytest.fail(f"if this is meant, run tests/sharding_golden.py\n{difference}", pytrace=False)
