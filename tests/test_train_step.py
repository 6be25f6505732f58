from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.errors import UserError
from metacanvas_jax.train.objectives import understanding
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.state import cast, new_state, step_key, update_ema
from metacanvas_jax.train.step import make_step

OPTIMIZER = make_optimizer(OptimizerConfig(1e-2))
SEED = jax.random.key(7)


def prepare(frozen, batch, key):
    return {"x": batch["x"] @ frozen["base"], "y": batch["y"]}


def loss(trainable, frozen, prepared, key):
    error = prepared["x"] @ trainable["kernel"] + trainable["bias"][None] - prepared["y"]
    value = jnp.mean(error**2)
    return value, {"largest": jnp.mean(jnp.max(jnp.abs(error), axis=1))}


def problem(batch=12):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"kernel": jax.random.normal(keys[0], (4, 3)), "bias": jnp.zeros((3,))}
    frozen = {"base": jax.random.normal(keys[1], (5, 4))}
    data = {"x": jax.random.normal(keys[2], (batch, 5)), "y": jax.random.normal(keys[3], (batch, 3))}
    return params, frozen, data


@pytest.fixture(scope="module")
def plain():
    return make_step(prepare, loss, OPTIMIZER)


def test_step_follows_the_gradient_and_leaves_frozen_out_of_the_state(plain):
    params, frozen, batch = problem()
    state = new_state(params, OPTIMIZER)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * (12 + 3) + 2  # two moments and two counts
    losses = []
    for _ in range(200):
        state, metrics = plain(state, frozen, batch, SEED)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 200
    error = (batch["x"] @ frozen["base"]) @ params["kernel"] - batch["y"]
    np.testing.assert_allclose(losses[0], np.mean(np.square(error)), rtol=1e-5)


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_microbatches_add_up_to_the_big_batch(plain, parts):
    params, frozen, batch = problem()
    split = make_step(prepare, loss, OPTIMIZER, accumulate=parts)
    one, many = new_state(params, OPTIMIZER), new_state(params, OPTIMIZER)
    for _ in range(2):
        one, expected = plain(one, frozen, batch, SEED)
        many, metrics = split(many, frozen, batch, SEED)
        for name in ("loss", "largest", "grad_norm", "param_norm"):
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one.opt_state, many.opt_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one.params, many.params)


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_microbatches_count_by_their_weight(parts):
    """A mean over tokens, of which the samples have 1 to 12: every token counts the same, however they are split."""

    def over_tokens(trainable, frozen, prepared, key):
        del frozen, key
        error = prepared["x"] @ trainable["kernel"] - prepared["y"]
        weight = jnp.sum(prepared["tokens"])
        value = jnp.sum(prepared["tokens"] * jnp.mean(error**2, axis=1)) / weight
        return value, {"largest": jnp.sum(prepared["tokens"] * jnp.max(error, axis=1)) / weight, "weight": weight}

    def keep_tokens(frozen, batch, key):
        return prepare(frozen, batch, key) | {"tokens": batch["tokens"]}

    params, frozen, batch = problem()
    batch |= {"tokens": jnp.arange(1.0, 13.0)}
    whole = make_step(keep_tokens, over_tokens, OPTIMIZER)
    split = make_step(keep_tokens, over_tokens, OPTIMIZER, accumulate=parts)
    _, expected = whole(new_state(params, OPTIMIZER), frozen, batch, SEED)
    _, metrics = split(new_state(params, OPTIMIZER), frozen, batch, SEED)
    assert "weight" not in metrics and "weight" not in expected
    for name in ("loss", "largest", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)


def test_answers_of_any_length_count_by_their_tokens_however_a_batch_is_split():
    """The loss that teaches an MLLM, of answers of 1 and of 5 tokens by turns: microbatches have 2 or 10."""

    class Model:
        """States are rows of a table; so are logits."""

        def apply(self, variables, given, cache=None, method=None):
            return SimpleNamespace(hidden=variables["params"]["table"][given.tokens]) if method == "encode" else given

    keys = jax.random.split(jax.random.key(1), 2)
    params = {"table": jax.random.normal(keys[0], (7, 7))}
    tokens, lengths = jax.random.randint(keys[1], (4, 6), 0, 7), jnp.array([1, 5, 1, 5])
    weights = (jnp.arange(6)[None] >= 6 - lengths[:, None]).astype(jnp.float32)
    batch = {"tokens": tokens, "positions": jnp.zeros((4, 3, 6), jnp.int32), "mask": weights == 1, "weights": weights}
    found = []
    for parts in (1, 2, 4):
        step = make_step(*understanding(Model()), OPTIMIZER, accumulate=parts)
        _, metrics = step(new_state(params, OPTIMIZER), {}, batch, SEED)
        found.append([metrics[name] for name in ("loss", "accuracy", "grad_norm")])
    np.testing.assert_allclose(found[1:], found[:1] * 2, rtol=1e-5)


def test_microbatches_draw_different_noise_and_every_step_its_own():
    def noisy(trainable, frozen, prepared, key):
        return jnp.sum(trainable["kernel"] ** 2), {"draw": jax.random.uniform(key)}

    params, frozen, batch = problem()
    step = make_step(lambda frozen, batch, key: None, noisy, OPTIMIZER, accumulate=2)
    state = new_state(params, OPTIMIZER)
    draws = []
    for _ in range(2):
        state, metrics = step(state, frozen, batch, SEED)
        draws.append(float(metrics["draw"]))
    keys = [jax.random.fold_in(step_key(SEED, n), i) for n in range(2) for i in range(2)]
    alone = [float(jax.random.uniform(jax.random.split(key)[1])) for key in keys]
    np.testing.assert_allclose(draws, [np.mean(alone[:2]), np.mean(alone[2:])], rtol=1e-6)
    assert len(set(alone)) == 4


def test_step_without_finite_loss_changes_nothing_and_no_later_step_does(plain):
    params, frozen, batch = problem()
    state, _ = plain(new_state(params, OPTIMIZER), frozen, batch, SEED)
    before = jax.tree.map(np.asarray, (state.step, state.params, state.opt_state))
    bad = batch | {"x": batch["x"].at[3, 0].set(jnp.inf)}
    for data, flagged in ((bad, 0.0), (batch, 0.0)):
        state, metrics = plain(state, frozen, data, SEED)
        assert float(metrics["finite"]) == flagged
        assert not bool(state.finite)
        jax.tree.map(np.testing.assert_array_equal, before, (state.step, state.params, state.opt_state))


def test_batches_that_are_not_finite_are_skipped_up_to_the_limit():
    params, frozen, batch = problem()
    step = make_step(prepare, loss, OPTIMIZER, ema_decay=0.9, max_skips=2)
    bad = batch | {"x": batch["x"].at[3, 0].set(jnp.inf)}
    state = new_state(params, OPTIMIZER, ema=True)
    state, _ = step(state, frozen, batch, SEED)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state, state.ema))
    for skipped in (1, 2):
        state, metrics = step(state, frozen, bad, SEED)
        assert (int(state.step), int(state.skipped), float(metrics["finite"])) == (1 + skipped, skipped, 1.0)
        jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.opt_state, state.ema))
    state, _ = step(state, frozen, batch, SEED)
    assert int(state.step) == 4
    assert not np.array_equal(state.params["bias"], before[0]["bias"])
    state, metrics = step(state, frozen, bad, SEED)  # one too many: the state of step 4 stays
    assert (int(state.step), int(state.skipped), float(metrics["finite"])) == (4, 2, 0.0)


def test_gradient_that_is_not_finite_is_caught_though_the_loss_is():
    def steep(trainable, frozen, prepared, key):
        return jnp.sum(jnp.sqrt(trainable["bias"])), {}  # zero, with an infinite derivative at zero

    params, frozen, batch = problem()
    step = make_step(lambda *_: None, steep, OPTIMIZER)
    state, metrics = step(new_state(params, OPTIMIZER), frozen, batch, SEED)
    assert float(metrics["loss"]) == 0.0
    assert not bool(state.finite)
    np.testing.assert_array_equal(state.params["bias"], params["bias"])


def test_moving_average_with_warm_up():
    params, frozen, batch = problem()
    step = make_step(prepare, loss, OPTIMIZER, ema_decay=0.15)
    state = new_state(params, OPTIMIZER, ema=True)
    expected = np.asarray(params["kernel"])
    for n in range(3):
        state, _ = step(state, frozen, batch, SEED)
        decay = min(0.15, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["kernel"])
    np.testing.assert_allclose(state.ema["kernel"], expected, rtol=1e-6)
    constant = update_ema({"a": jnp.zeros(())}, {"a": jnp.ones(())}, jnp.int32(0), 0.9, warmup=False)
    np.testing.assert_allclose(constant["a"], 0.1, rtol=1e-5)


def test_masters_are_float32_and_frozen_weights_are_cast_once():
    tree = {"kernel": jnp.ones((2, 2), jnp.bfloat16), "index": jnp.zeros((2,), jnp.int32)}
    assert new_state({"kernel": tree["kernel"]}, OPTIMIZER).params["kernel"].dtype == jnp.float32
    assert {k: v.dtype.name for k, v in cast(tree, "bfloat16").items()} == {"kernel": "bfloat16", "index": "int32"}


def test_batch_that_does_not_divide_is_an_error():
    params, frozen, batch = problem()
    step = make_step(prepare, loss, OPTIMIZER, accumulate=5)
    with pytest.raises(UserError, match="12 samples does not divide into 5 microbatches"):
        step(new_state(params, OPTIMIZER), frozen, batch, SEED)
