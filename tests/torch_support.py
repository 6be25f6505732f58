"""Tiny random reference networks (torch only)."""

import torch


def randomize(model, seed: int = 1234):
    """Every parameter gets a seeded random value: gains, biases, modulation tables and zero-initialised layers too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            last = name.rsplit(".", 1)[-1]
            if last == "bias":
                parameter.copy_(0.1 * noise)
            elif parameter.ndim <= 1:
                parameter.copy_(1.0 + 0.2 * noise)
            elif "table" in last or "modulation" in last:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()
