"""Loss and gradients of the whole step, in miniature, on meshes of eight devices against one device."""

import dataclasses

import jax
import numpy as np
import pytest
from experiments_support import FAST, batch, miniature, random_parameters

from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh, on_mesh, put_batch
from metacanvas_jax.parallel.rules import shardings
from metacanvas_jax.train.job import make_job
from metacanvas_jax.trees import flat, partition

BACKBONES = {"sana": "t2i_scratch", "flux": "image_editing", "wan": "video_stage3"}
MESHES = {
    "data": MeshConfig(),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=4, tensor=2),
    "context": MeshConfig(data=4, context=2),
    "fsdp+tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp+context": MeshConfig(data=2, fsdp=2, context=2, whole=("mllm",)),
}
CASES = [
    pytest.param(name, mesh, marks=() if mesh == "fsdp+context" else pytest.mark.slow, id=f"{name}-{mesh}")
    for name in BACKBONES
    for mesh in MESHES
]
alone: dict = {}


def step(name, mesh=None):
    """(loss, gradients) of a config's last bucket; ``mesh`` None is one device."""
    setup = miniature(BACKBONES[name])
    bucket = dataclasses.replace(setup.shapes[-1], size=(72, 72))  # tokens that two devices can share
    job, key = make_job(setup), jax.random.key(0)
    boxed = jax.eval_shape(job.init, key)
    params, inputs = random_parameters(job), batch(setup, bucket)
    if mesh is not None:
        config = MESHES[mesh]
        mesh = make_mesh(config)
        params = jax.device_put(params, shardings(boxed, mesh, whole=config.whole))
        inputs = put_batch(inputs, mesh)
    trainable, frozen = partition(params, job.rules)

    def gradients(trainable, frozen, inputs, key):
        return jax.value_and_grad(job.loss, has_aux=True)(trainable, frozen, job.prepare(frozen, inputs, key), key)

    def run():
        arguments = trainable, frozen, inputs, key
        (loss, _), grads = jax.jit(gradients).lower(*arguments).compile(compiler_options=FAST)(*arguments)
        return float(loss), jax.device_get(grads)

    if mesh is None:
        return run()
    with on_mesh(mesh):
        return run()


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_mesh_changes_no_loss_and_no_gradient(name, mesh):
    if name not in alone:
        alone[name] = step(name)
    (loss, grads), (wanted, expected) = step(name, mesh), alone[name]
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    expected = flat(expected)
    largest = max(np.abs(grad).max() for grad in expected.values())
    for path, grad in flat(grads).items():
        # What softmax forgets, such as a bias of the keys, has a gradient of rounding errors.
        scale = max(np.abs(expected[path]).max(), 1e-7 * largest)
        np.testing.assert_allclose(grad, expected[path], rtol=0, atol=2e-4 * scale, err_msg=path)
