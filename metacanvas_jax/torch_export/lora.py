"""Low-rank adapters on a model as it is: read from PEFT's and diffusers' files, active only where they should be."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from metacanvas_jax import files
from metacanvas_jax.errors import UserError


class Adapter(nn.Module):
    """The two matrices of one layer; a layer that is a 1x1 convolution has 1x1 convolutions here."""

    def __init__(self, a: Tensor, b: Tensor, scale: float):
        super().__init__()
        self.a, self.b = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """What the adapter adds to the layer's output."""
        apply = F.linear if self.a.ndim == 2 else F.conv2d
        return self.scale * apply(apply(x, self.a), self.b)


class Adapters(nn.Module):
    """All adapters of a model, hung beside its layers; they act while ``enabled``.

    For the MLLM of MetaCanvas ``enabled`` is False while it reads a prompt and True while it writes the canvas.
    """

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor], scale: float):
        super().__init__()
        self.enabled = True
        self.layers = nn.ModuleDict()
        layers = dict(model.named_modules())
        for name in sorted({key.rpartition(".lora_")[0] for key in tensors}):
            if name not in layers:
                raise UserError(f"the adapter is for another model: it has no layer {name}")
            adapter = Adapter(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], scale)
            self.layers[name.replace(".", "/")] = adapter
            layers[name].register_forward_hook(self._hook(adapter))

    def _hook(self, adapter: Adapter):
        def add(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + adapter(arguments[0]).to(output.dtype) if self.enabled else output

        return add

    @contextlib.contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """Turns all adapters on or off for a while."""
        before, self.enabled = self.enabled, on
        try:
            yield
        finally:
            self.enabled = before


def read_peft(folder: Path) -> tuple[dict[str, Tensor], float]:
    """Tensors by layer name, and ``alpha / rank``, of a folder in PEFT's layout."""
    config = files.read_json(folder / "adapter_config.json")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {name.removeprefix("base_model.model."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors, config["lora_alpha"] / config["r"]


def read_diffusers(folder: Path) -> tuple[dict[str, Tensor], float]:
    """The same of a folder in diffusers' layout."""
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        tensors = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    return tensors, config["transformer.lora_alpha"] / config["transformer.r"]
