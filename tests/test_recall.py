"""What the states of a small MLLM must tell beside the next token."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.train.objectives import recall_loss, understanding

VOCAB, BACK, LENGTH = 5, 2, 7
TOKENS = jax.random.randint(jax.random.key(0), (3, LENGTH), 0, VOCAB)
MASK = jnp.arange(LENGTH)[None] < jnp.array([[7], [5], [3]])


def head(hidden):
    """Reads the first of the three parts of a state."""
    return 50.0 * hidden[..., :VOCAB]


def states(tell):
    """Parts of a state: nothing, then the token ``tell[0]`` places back, then the one ``tell[1]`` places back."""
    told = [jax.nn.one_hot(jnp.roll(TOKENS, back, axis=1), VOCAB) for back in tell]
    return jnp.concatenate([jnp.zeros((3, LENGTH, VOCAB)), *told], axis=-1)


def test_states_that_tell_the_tokens_before_them_lose_nothing():
    assert recall_loss(head, states((0, 1)), TOKENS, MASK, BACK) < 1e-6
    assert recall_loss(head, states((1, 0)), TOKENS, MASK, BACK) > 1.0


def test_states_that_tell_nothing_lose_what_guessing_loses():
    np.testing.assert_allclose(
        recall_loss(head, jnp.zeros((3, LENGTH, 3 * VOCAB)), TOKENS, MASK, BACK), np.log(VOCAB), rtol=1e-6
    )


@pytest.mark.parametrize("changed", ["hidden", "tokens"])
def test_padding_is_nothing_to_recall(changed):
    hidden, tokens = states((0, 1)), TOKENS
    if changed == "hidden":
        hidden = jnp.where(MASK[..., None], hidden, -hidden)
    else:
        tokens = jnp.where(MASK, tokens, 0)
    assert recall_loss(head, hidden, tokens, MASK, BACK) < 1e-6


@pytest.mark.parametrize(("within", "same"), [(4, True), (None, False)])
def test_only_the_first_states_are_asked_to_recall(within, same):
    class Model:
        """States that tell the tokens before them, and the head that reads them."""

        def apply(self, variables, given, cache=None, method=None):
            return SimpleNamespace(hidden=states((0, 1))) if method == "encode" else head(given)

    def recalled(tokens):
        positions = jnp.zeros((3, 3, LENGTH), jnp.int32)
        batch = {"tokens": tokens, "positions": positions, "mask": MASK, "weights": jnp.ones((3, LENGTH))}
        return understanding(Model(), BACK, within)[1]({}, {}, batch, jax.random.key(0))[1]["recall"]

    later = TOKENS.at[:, 4:].set((TOKENS[:, 4:] + 1) % VOCAB)
    assert recalled(TOKENS) < 1e-6
    assert (recalled(later) < 1e-6) == same
