"""Adapters in FLUX, FLUX.2 and Wan against diffusers and peft: the published names load, and give the same velocity."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
import test_dit_flux as flux_test
import test_dit_flux2 as flux2_test
import test_dit_wan as wan_test
from dit_torch_support import imported, random, relative, shapes
from vae_support import FAST_COMPILE

from metacanvas_jax import registry
from metacanvas_jax.dit.flux import network as flux
from metacanvas_jax.dit.flux2 import network as flux2
from metacanvas_jax.dit.wan import network as wan
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.trees import flat, nested
from metacanvas_jax.weights import lora
from metacanvas_jax.weights.hf_export import save_params
from metacanvas_jax.weights.hf_import import load_params

DITS = {
    "flux": (flux_test, flux.PROJECTIONS, {"references": ((4, 6),)}),
    "flux2": (flux2_test, flux2.PROJECTIONS, {"references": ((2, 3),)}),
    "wan": (wan_test, wan.PROJECTIONS, {}),
}
# Layers of two blocks: 2 double of two streams and 2 single; 2 of two attentions and an MLP.
LAYERS = {"flux": 2 * 2 * 7 + 2 * 6, "flux2": 2 * 2 * 6 + 2 * 2, "wan": 2 * 10}


@pytest.mark.torch
# peft asks networks for an attribute that transformers renames.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", DITS)
def test_adapters_of_every_layer_do_what_they_do_in_diffusers(name, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the [torch] extra")
    pytest.importorskip("peft", reason="needs the [torch] extra")
    from torch_support import randomize

    module, targets, options = DITS[name]
    plain, adapters = module.TINY, LoraConfig(rank=3, alpha=6.0, targets=targets)
    config = dataclasses.replace(plain, lora=adapters)
    record = registry.of(config)
    torch_net = randomize(module.build(plain)).eval()
    latents, time, *conditions = module.inputs(plain, **options)
    base = imported(record.module(plain), record.table(plain), torch_net, tmp_path / "base", latents, *conditions)
    abstract = shapes(record.module(config), latents, *conditions)
    ours = {
        p: 0.1 * random(*x.shape, seed=i) for i, (p, x) in enumerate(sorted(flat(abstract).items())) if "_lora/" in p
    }

    table = lora.table(record.table(config), adapters, lora.DIFFUSERS)
    about = {"r": 3, "lora_alpha": 6.0, "target_modules": lora.modules(table, lora.DIFFUSERS)}
    assert len(about["target_modules"]) == LAYERS[name]
    metadata = {"lora_adapter_metadata": json.dumps({f"{lora.DIFFUSERS}{key}": value for key, value in about.items()})}
    stem = "pytorch_lora_weights"
    save_params(nested(ours), table, tmp_path / "lora", metadata=metadata, stem=stem, progress=False)
    read = load_params(
        tmp_path / "lora", table, nested({p: x for p, x in flat(abstract).items() if p in ours}), progress=False
    )
    assert all(np.array_equal(value, ours[path]) for path, value in flat(read).items())

    run = jax.jit(
        lambda params: record.module(config).apply({"params": params}, latents, time, *conditions),
        compiler_options=FAST_COMPILE,
    )
    adapted = run(nested(flat(base) | flat(read)))
    without = run(nested(flat(base) | {path: 0 * value for path, value in ours.items()}))
    torch_net.load_lora_adapter(tmp_path / "lora", weight_name=f"{stem}.safetensors")
    arguments = conditions[:1] if name == "wan" else conditions
    with torch.no_grad():
        theirs = module.run_torch(torch, torch_net, latents, time, *arguments)
    assert relative(adapted, theirs) < 2e-5
    assert relative(without, theirs) > 1e-2


@pytest.mark.parametrize("config", [flux.FluxConfig, flux2.Flux2Config, wan.WanConfig])
def test_adapters_refuse_layers_that_the_blocks_do_not_have_and_dropout(config):
    with pytest.raises(ValueError, match=r"unknown LoRA targets \['to_q'\]; choose from \('q', 'k', 'v'"):
        config(lora=LoraConfig(rank=2, alpha=2.0, targets=("to_q",)))
    with pytest.raises(ValueError, match=r"adapters of a DiT have no dropout, found 0\.1"):
        config(lora=LoraConfig(rank=2, alpha=2.0, targets=("q",), dropout=0.1))


@pytest.mark.parametrize("name", DITS)
def test_adapters_are_siblings_of_their_layers_and_leave_the_other_parameters_alone(name):
    module, targets, options = DITS[name]
    latents, _, *conditions = module.inputs(module.TINY, **options)

    def names(config):
        net = registry.of(config).module(config)
        return set(flat(nn.meta.unbox(shapes(net, latents, *conditions))))

    plain = names(module.TINY)
    adapted = names(dataclasses.replace(module.TINY, lora=LoraConfig(rank=2, alpha=2.0, targets=targets)))
    assert plain < adapted
    layers = {path.rpartition("_lora/")[0] for path in adapted - plain}
    assert layers and all(f"{layer}/kernel" in plain for layer in layers)
