"""Parity tests of the DiTs: one tiny random network in both frameworks, gradients, full-size manifests."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from metacanvas_jax.weights.hf_import import load_params
from metacanvas_jax.weights.table import count, published_shapes


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_like(abstract):
    """Random parameters of the given shapes, scaled to keep activations of order one; no path through them is dead."""
    return jax.tree.map(lambda x: jnp.asarray(random(*x.shape, seed=x.size) / max(x.shape[-2:][0], 1) ** 0.5), abstract)


def shapes(net, latents, *conditions):
    """The unboxed parameter shapes of a network, from inputs or their shapes."""
    time = jax.ShapeDtypeStruct(latents.shape[:1], jnp.float32)
    return nn.meta.unbox(jax.eval_shape(net.init, jax.random.key(0), latents, time, *conditions))["params"]


def imported(net, table, torch_net, folder, latents, *conditions):
    """Saves the torch network and reads it back through the importer."""
    torch_net.save_pretrained(folder)
    return load_params(folder, table, shapes(net, latents, *conditions), progress=False)


def torch_gradients(table, torch_net):
    """The gradients of the torch network, as the importer would lay them out."""
    gradients = {name: parameter.grad.numpy() for name, parameter in torch_net.named_parameters()}
    result = {}
    for entry in table:
        values = [entry.transform.forward(gradients[entry.names(layer)[0]]) for layer in entry.tensors]
        result[entry.path] = values[0] if entry.layers is None else np.stack(values)
    return result


def assert_gradients_equal(ours, reference, tolerance):
    """Every parameter, relative to its own largest gradient, or to a thousandth of the largest of all.

    The floor is for gradients that are zero but for rounding, such as that of a key's bias under a softmax.
    """
    ours = flatten_dict(ours, sep="/")
    assert ours.keys() == reference.keys()
    largest = {path: np.abs(np.asarray(gradient)).max() for path, gradient in reference.items()}
    floor = 1e-3 * max(largest.values())
    errors = {
        path: np.abs(np.asarray(ours[path]) - np.asarray(reference[path])).max() / max(largest[path], floor)
        for path in ours
    }
    wrong = {path: error for path, error in errors.items() if not error <= tolerance}
    assert not wrong, wrong


def check_manifest(net, table, build, latents, *conditions, parameters):
    """Names and shapes of the full-size torch network, built without memory, are the table's; so is their number."""
    import torch

    with torch.device("meta"):
        published = {name: tuple(parameter.shape) for name, parameter in build().named_parameters()}
    abstract = shapes(net, latents, *conditions)
    assert published_shapes(table, abstract) == published
    assert count(abstract) == parameters


def relative(actual, expected) -> float:
    """Largest difference, relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def dtypes_in_bfloat16(net, latents, *conditions):
    """Dtypes of parameters, patch tokens and velocity when a network computes in bfloat16, without running it."""
    time = jnp.zeros(latents.shape[:1], jnp.float32)

    def both(key):
        variables = net.init(key, latents, time, *conditions)
        tokens = net.apply(variables, latents, time, *conditions, method="embed")
        return (
            variables,
            net.apply(variables, tokens, conditions[0], method="run").grid,
            net.apply(variables, latents, time, *conditions),
        )

    variables, tokens, velocity = jax.eval_shape(both, jax.random.key(0))
    return {x.dtype.name for x in jax.tree.leaves(variables)}, tokens.dtype.name, velocity.dtype.name
