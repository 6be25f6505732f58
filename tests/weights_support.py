"""A made-up network for the tests of import and export: every kind of entry a table may hold, at sizes that divide."""

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metacanvas_jax.weights.table import CONV2D, CONV3D, LINEAR, SAME, Entry, Transform, half_split, then

LAYERS = 4
REVERSED = Transform(lambda x: x[::-1], lambda x: x[::-1])  # stands for a transform that cannot be cut

TABLE = [
    Entry("embed.weight", "embed/table", SAME, aliases=("model.embed.weight", "head.weight")),
    Entry(
        "blocks.{i}.q.weight", "blocks/q/kernel", then(LINEAR, half_split(8)), LAYERS, ("model.blocks.{i}.q.weight",)
    ),
    Entry("blocks.{i}.q.bias", "blocks/q/bias", half_split(8), LAYERS),
    Entry("blocks.{i}.o.weight", "blocks/o/kernel", LINEAR, LAYERS),
    Entry("blocks.{i}.gate", "blocks/gate", SAME, LAYERS),
    Entry("later.{i}.weight", "later/kernel", LINEAR, 2, first=1),
    Entry("patch.weight", "patch/kernel", CONV3D),
    Entry("mix.weight", "mix/kernel", CONV2D),
    Entry("odd.weight", "odd/kernel", REVERSED),
    Entry("norm.weight", "norm/scale", SAME),
    Entry("scale", "scale", SAME),
    Entry("steps", "steps", SAME),
]
SHAPES = {
    "embed/table": (48, 16),
    "blocks/q/kernel": (LAYERS, 16, 32),
    "blocks/q/bias": (LAYERS, 32),
    "blocks/o/kernel": (LAYERS, 32, 16),
    "blocks/gate": (LAYERS,),
    "later/kernel": (2, 16, 8),
    "patch/kernel": (1, 2, 2, 4, 16),
    "mix/kernel": (3, 3, 16, 8),
    "odd/kernel": (16, 8),
    "norm/scale": (16,),
    "scale": (),
    "steps": (8,),
}


def published(seed=0, dtype=np.float32):
    """Tensors by their published names, written down by hand and not by the table."""
    random = np.random.default_rng(seed)
    shapes = {"embed.weight": (48, 16), "patch.weight": (16, 4, 1, 2, 2), "mix.weight": (8, 16, 3, 3)}
    shapes |= {"odd.weight": (16, 8), "norm.weight": (16,), "scale": ()}
    for i in range(LAYERS):
        shapes |= {f"blocks.{i}.q.weight": (32, 16), f"blocks.{i}.q.bias": (32,), f"blocks.{i}.gate": ()}
        shapes |= {f"blocks.{i}.o.weight": (16, 32)}
    shapes |= {f"later.{i}.weight": (8, 16) for i in (1, 2)}
    tensors = {name: np.asarray(random.standard_normal(shape), dtype) for name, shape in shapes.items()}
    return tensors | {"steps": np.arange(8, dtype=np.int32)}


def expected(tensors):
    """The parameters that the published tensors are, said again in plain numpy."""
    pairs = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    order = np.concatenate([8 * head + pairs for head in range(4)])
    return {
        "embed/table": tensors["embed.weight"],
        "blocks/q/kernel": np.stack([tensors[f"blocks.{i}.q.weight"][order].T for i in range(LAYERS)]),
        "blocks/q/bias": np.stack([tensors[f"blocks.{i}.q.bias"][order] for i in range(LAYERS)]),
        "blocks/o/kernel": np.stack([tensors[f"blocks.{i}.o.weight"].T for i in range(LAYERS)]),
        "blocks/gate": np.stack([tensors[f"blocks.{i}.gate"] for i in range(LAYERS)]),
        "later/kernel": np.stack([tensors["later.1.weight"].T, tensors["later.2.weight"].T]),
        "patch/kernel": np.einsum("octhw->thwco", tensors["patch.weight"]),
        "mix/kernel": np.einsum("ochw->hwco", tensors["mix.weight"]),
        "odd/kernel": tensors["odd.weight"][::-1],
        "norm/scale": tensors["norm.weight"],
        "scale": tensors["scale"],
        "steps": tensors["steps"],
    }


def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))


def abstract(spec=None, dtype=np.float32):
    """Shapes of all parameters; ``spec(path, shape)`` shards them over ``mesh()``."""
    structs = {}
    for path, shape in SHAPES.items():
        kind = np.int32 if path == "steps" else dtype
        sharding = None if spec is None else NamedSharding(mesh(), PartitionSpec(*spec(path, shape)))
        structs[path] = jax.ShapeDtypeStruct(shape, kind, sharding=sharding)
    return unflatten_dict(structs, sep="/")


def assert_params(params, tensors):
    """Bit for bit."""
    flat, reference = flatten_dict(params, sep="/"), expected(tensors)
    assert flat.keys() == reference.keys()
    for path, value in flat.items():
        want = reference[path].astype(value.dtype)
        assert value.shape == want.shape, path
        assert np.asarray(value).tobytes() == np.ascontiguousarray(want).tobytes(), path


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
