import re

import pytest

from metacanvas_jax.errors import UserError
from metacanvas_jax.trees import flat, merge, partition

PARAMS = {
    "canvas": {"tokens": 1},
    "dit": {"blocks": {"cross": {"kernel": 2, "bias": 3}, "self": {"kernel": 4}}, "final": {"kernel": 5}},
    "mllm": {"embed": 6},
}
STAGE_TWO = (("canvas/.*", "train"), (".*/cross/.*", "train"), ("dit/.*|mllm/.*", "freeze"))


def test_sides_and_merge_are_inverse():
    trainable, frozen = partition(PARAMS, STAGE_TWO)
    assert trainable == {"canvas": {"tokens": 1}, "dit": {"blocks": {"cross": {"kernel": 2, "bias": 3}}}}
    assert frozen == {"dit": {"blocks": {"self": {"kernel": 4}}, "final": {"kernel": 5}}, "mllm": {"embed": 6}}
    assert merge(trainable, frozen) == PARAMS


def test_first_match_wins_and_the_whole_path_counts():
    trainable, _ = partition(PARAMS, (("dit/final/kernel", "freeze"), ("dit/.*", "train"), (".*", "freeze")))
    assert set(flat(trainable)) == {"dit/blocks/cross/kernel", "dit/blocks/cross/bias", "dit/blocks/self/kernel"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("dit/.*", "train"), ("canvas/.*", "train")), "no rule of the partition matches mllm/embed"),
        ((("canvas", "train"), ("[dm].*", "freeze")), "no rule of the partition matches canvas/tokens"),
        (((".*", "train"), ("vae/.*", "freeze")), "decide about no parameter: 'vae/.*'"),
        (((".*", "freeze"), ("canvas/.*", "train")), "decide about no parameter: 'canvas/.*'"),
        (((".*", "thaw"),), "partition rule '.*': the action is 'train' or 'freeze', not 'thaw'"),
        ((("dit/(", "train"),), "partition rule 'dit/(' is not a regular expression"),
    ],
)
def test_bad_rules_are_named(rules, message):
    with pytest.raises(UserError, match=re.escape(message)):
        partition(PARAMS, rules)


def test_merge_refuses_a_parameter_on_both_sides():
    with pytest.raises(ValueError, match="both trainable and frozen: canvas/tokens"):
        merge({"canvas": {"tokens": 1}}, PARAMS)
