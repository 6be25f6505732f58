"""Shared by the parity tests of the autoencoders: random torch networks, imported the way users import."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from metacanvas_jax.weights.hf_import import load_params
from metacanvas_jax.weights.table import count, published_shapes

FAST_COMPILE = {"xla_backend_optimization_level": 0}  # a third of the time to compile, on tiny networks none to run


def randomize(model, seed=1234):
    """Every parameter random, norms and biases too, so that none can be left out unnoticed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.1 * values)
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * values)
            else:
                parameter.copy_(values / parameter[0].numel() ** 0.5)
    return model.eval()


def abstract_params(network, frames=1):
    """The shapes of all parameters."""
    size = network.spatial
    video = jax.ShapeDtypeStruct((1, frames, size, size, 3), jnp.float32)
    return nn.meta.unbox(jax.eval_shape(network.init, jax.random.key(0), video))["params"]


def imported(network, table, model, folder):
    """Saves the torch model and reads it back as parameters of the network."""
    model.save_pretrained(folder)
    return {"params": load_params(folder, table, abstract_params(network), progress=False)}


def check_manifest(network, table, build, parameters):
    """Names, shapes and number of the full-size torch model's tensors, built without memory, are those of the table."""
    import torch

    with torch.device("meta"):
        published = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    abstract = abstract_params(network)
    assert published_shapes(table, abstract) == published
    assert count(abstract) == parameters


def random(*shape, seed=0, clip=None):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return values if clip is None else np.clip(values, -clip, clip)


def images_to_torch(x):
    """Frames [b t h w c] to a batch of images [(b t) c h w]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(x.reshape(-1, *x.shape[2:]).transpose(0, 3, 1, 2)))


def images_from_torch(x, like):
    """Images [(b t) c h w] to frames [b t h w c] with the b and t of ``like``."""
    return x.detach().numpy().transpose(0, 2, 3, 1).reshape(*like.shape[:2], *x.shape[2:], x.shape[1])


def assert_close(ours, reference, tolerance=5e-5):
    """Within ``tolerance`` of the largest reference value."""
    assert ours.shape == reference.shape
    error = np.abs(np.asarray(ours, np.float64) - reference).max() / np.abs(reference).max()
    assert error <= tolerance, f"relative error {error:.2e}"
