"""What the canvas connector is made of (paper, Table 3): parts left out one by one, all else as in t2i_scratch.py.

Command:   metacanvas sweep --config configs/connector_ablation.py --sweep configs/sweeps/connector.py
           metacanvas train --config configs/connector_ablation.py:no_dit_block
Variants:  full, no_time (no timestep in the DiT block), no_dit_block, no_vanilla_block, before_patchify (the canvas is
           added to the latents instead of the patch tokens), text (no canvas)
Hardware:  16 TPU v6e chips (4x4), 20 images per chip
Time:      about 3 h per variant (estimate)
Score:     GenEval 68.02, 67.42, 66.39, 66.19, 65.34, 64.09 in the order above
"""

from ml_collections import ConfigDict

from configs import base, t2i_scratch, tiny

VARIANTS = ("full", "no_time", "no_dit_block", "no_vanilla_block", "before_patchify", "text")


def get_config(variant: str = "") -> ConfigDict:
    """One row of Table 3."""
    name, miniature = base.choose("configs/connector_ablation.py", VARIANTS, variant)
    config = t2i_scratch.get_config("text" if name == "text" else "canvas")
    config.name = f"connector_{name}"
    leave_out(config, name)
    return tiny.shrink(config, miniature) if miniature else config


def leave_out(config: ConfigDict, name: str) -> None:
    """Changes a config with a canvas into the row ``name``."""
    if name == "no_time":
        config.canvas_connector.time_modulation = False
    if name == "no_dit_block":
        config.canvas_connector.dit_block = False
    if name == "no_vanilla_block":
        config.canvas_connector.vanilla_block = False
    if name == "before_patchify":
        config.canvas_connector.fuse = "before_patchify"
