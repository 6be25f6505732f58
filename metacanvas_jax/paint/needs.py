"""What a program reads of its parameters: which of them at all, and in which dtype.

A network casts most of its float32 parameters to the dtype that it computes in before anything else happens to them.
Held in that dtype they take half the memory, and every result keeps its bits. The traced program tells which
parameters these are, so that no table of them can be wrong.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

MOVES = frozenset(
    {"reshape", "transpose", "squeeze", "broadcast_in_dim", "slice", "rev", "copy", "copy_p", "sharding_constraint"}
    | {"dynamic_slice", "gather"}
)
"""Primitives that move values and compute nothing: a cast after them might as well have come before them."""

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Primitives that call one program with all their operands, in order: name to the parameter that holds it."""

Uses = frozenset
"""Of one input: the dtypes it is cast to, and None where it is used as it is."""


def needed(jaxpr: Any, inputs: Sequence[tuple[str, Any]]) -> dict[str, np.dtype]:
    """The dtype in which to hold each of the first inputs of a closed jaxpr; what nothing reads is left out.

    ``inputs`` are names and abstract arrays. It is the input's own dtype, or a narrower one if every use casts to it.
    """
    uses = _closed(jaxpr.jaxpr)
    return {name: _narrowest(leaf.dtype, found) for (name, leaf), found in zip(inputs, uses, strict=False) if found}


def together(*found: Mapping[str, np.dtype]) -> dict[str, np.dtype]:
    """What several programs need: everything that one of them reads, in the widest of their dtypes."""
    merged: dict[str, np.dtype] = {}
    for one in found:
        for name, dtype in one.items():
            merged[name] = max(dtype, merged.get(name, dtype), key=lambda x: x.itemsize)
    return merged


def _narrowest(own: Any, uses: Uses) -> np.dtype:
    own = np.dtype(own)
    if len(uses) == 1 and (cast := next(iter(uses))) is not None and jnp.issubdtype(own, jnp.floating):
        cast = np.dtype(cast)
        if jnp.issubdtype(cast, jnp.floating) and cast.itemsize < own.itemsize:
            return cast
    return own


@functools.lru_cache(maxsize=4096)
def _uses(jaxpr: Any) -> tuple[list[Uses], list[frozenset[int]]]:
    """The uses of every input of a jaxpr, and for every output the inputs whose values it may be."""
    uses: list[set] = [set() for _ in jaxpr.invars]
    same: dict[Any, frozenset[int]] = {var: frozenset([i]) for i, var in enumerate(jaxpr.invars)}
    same_as = lambda var: frozenset() if hasattr(var, "val") else same.get(var, frozenset())  # noqa: E731

    def note(sources: frozenset[int], kinds: Uses) -> None:
        for source in sources:
            uses[source] |= kinds

    for equation in jaxpr.eqns:
        operands = [same_as(var) for var in equation.invars]
        if not any(operands):
            continue
        name, params = equation.primitive.name, equation.params
        if name == "convert_element_type":
            note(operands[0], frozenset([params["new_dtype"]]))
        elif name in MOVES:
            same[equation.outvars[0]] = operands[0]
            for place in operands[1:]:
                note(place, frozenset([None]))
        elif name in CALLS and CALLS[name] in params:
            inner_uses, inner_same = _uses(_open(params[CALLS[name]]))
            for sources, kinds in zip(operands, inner_uses, strict=True):
                note(sources, kinds)
            for var, origins in zip(equation.outvars, inner_same, strict=True):
                same[var] = frozenset().union(*(operands[origin] for origin in origins))
        else:
            for sources, kinds in zip(operands, _inside(equation), strict=True):
                note(sources, kinds)
    return [frozenset(found) for found in uses], [same_as(var) for var in jaxpr.outvars]


def _inside(equation: Any) -> list[Uses]:
    """The uses of the operands of a loop, a branch or any other primitive, whose results are values of their own."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        body = _open(params["jaxpr"])
        carried = _carried(equation, body)
        return [frozenset([None]) if i in carried else kinds for i, kinds in enumerate(_closed(body))]
    if name == "cond":
        branches = [_closed(_open(branch)) for branch in params["branches"]]
        return [frozenset([None]), *(frozenset().union(*kinds) for kinds in zip(*branches, strict=True))]
    if name == "shard_map":
        return _closed(_open(params["jaxpr"]))
    return [frozenset([None])] * len(equation.invars)


def _carried(equation: Any, body: Any) -> range:
    """The operands of a scan that its steps pass on: between its constants and what it slices.

    Shapes tell them apart, because the parameters of a scan have other names in other releases of JAX. What is sliced
    has one axis less in the body; constants and carried values are the same. A scan returns what it carries first.
    """

    def unsliced(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))

    end = unsliced(equation.invars, body.invars)
    return range(end - unsliced(equation.outvars, body.outvars), end)


def _closed(jaxpr: Any) -> list[Uses]:
    """The uses of the inputs of a program whose results are values of their own."""
    uses, same = _uses(jaxpr)
    returned = frozenset().union(*same)
    return [kinds | {None} if i in returned else kinds for i, kinds in enumerate(uses)]


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)
