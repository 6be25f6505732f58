"""The miniature's linear autoencoder in PyTorch."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn


class Side(nn.Module):
    """Every patch of pixels is projected on its principal directions."""

    model = None
    temporal = 1

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor):
        super().__init__()
        self.mean, self.basis, self.scale = (nn.Parameter(x, requires_grad=False) for x in (mean, basis, scale))
        self.spatial, self.channels = int((len(mean) // 3) ** 0.5), basis.shape[1]

    @classmethod
    def from_pretrained(cls, folder: Path) -> "Side":
        """Reads an exported folder."""
        return cls(**load_file(folder / "model.safetensors"))

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents, in the dtype of the pixels."""
        patch, kind = self.spatial, self.basis.dtype  # which stays float32 where the networks are bfloat16
        cut = pixels.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # b c t h i w j
        patches = cut.permute(0, 2, 3, 5, 4, 6, 1).flatten(4)
        return ((patches.to(kind) - self.mean) @ (self.basis * self.scale)).movedim(-1, 1).to(pixels.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, in the dtype of the latents."""
        patch = self.spatial
        exact = latents.movedim(1, -1).to(self.basis.dtype)
        patches = (exact @ (self.basis / self.scale).T + self.mean).to(latents.dtype)
        cut = patches.unflatten(4, (patch, patch, 3)).permute(0, 6, 1, 2, 4, 3, 5)
        return cut.flatten(5, 6).flatten(3, 4)
