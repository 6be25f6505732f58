"""The kernels' results in float64 numpy, from all pairs of queries and keys; tests and benchmarks compare with it."""

import numpy as np

from metacanvas_jax.kernels.masks import MaskSpec


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: MaskSpec, scale: float) -> np.ndarray:
    """``[b n h e]`` from ``[b n h e]`` and ``[b m g e]``; zeros for a query that sees no key."""
    weights, (_, _, v) = _weights(q, k, v, mask, scale)
    return np.einsum("bhnm,bmhe->bnhe", weights, v)


def attention_gradients(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, mask: MaskSpec, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of ``sum(dout * attention(q, k, v))`` with respect to q, k and v."""
    groups, dout = k.shape[2], np.asarray(dout, np.float64)
    weights, (q, k, v) = _weights(q, k, v, mask, scale)
    dv = np.einsum("bhnm,bnhe->bmhe", weights, dout)
    dweights = np.einsum("bnhe,bmhe->bhnm", dout, v)
    dlogits = weights * (dweights - np.sum(weights * dweights, axis=-1, keepdims=True)) * scale
    dq, dk = np.einsum("bhnm,bmhe->bnhe", dlogits, k), np.einsum("bhnm,bnhe->bmhe", dlogits, q)
    return dq, _per_group(dk, groups), _per_group(dv, groups)


def largest_logit(q: np.ndarray, k: np.ndarray, scale: float) -> float:
    """The largest absolute value of a logit, masked ones included."""
    k = np.repeat(np.asarray(k, np.float64), q.shape[2] // k.shape[2], axis=2)
    return float(np.max(np.abs(np.einsum("bnhe,bmhe->bhnm", np.asarray(q, np.float64), k)))) * abs(scale)


def _weights(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: MaskSpec, scale: float):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("bnhe,bmhe->bhnm", q, k) * scale
    seen = np.broadcast_to(_seen(mask, q.shape[1], k.shape[1]), logits.shape)
    logits = np.where(seen, logits, -np.inf)
    top = np.max(logits, axis=-1, keepdims=True)
    weights = np.where(seen, np.exp(logits - np.where(np.isfinite(top), top, 0.0)), 0.0)
    total = np.sum(weights, axis=-1, keepdims=True)
    return weights / np.where(total == 0.0, 1.0, total), (q, k, v)


def _seen(mask: MaskSpec, n: int, m: int) -> np.ndarray:
    seen = np.ones((1, 1, n, m), bool)
    if mask.causal:
        seen = seen & (np.arange(m)[None, :] <= np.arange(n)[:, None] + mask.offset)
    if mask.keys is not None:
        seen = seen & np.asarray(mask.keys)[:, None, None, :]
    if mask.query_segments is not None:
        seen = seen & (
            np.asarray(mask.query_segments)[:, None, :, None] == np.asarray(mask.key_segments)[:, None, None]
        )
    return seen


def _per_group(x: np.ndarray, groups: int) -> np.ndarray:
    return x.reshape(*x.shape[:2], groups, -1, x.shape[-1]).sum(axis=3)
