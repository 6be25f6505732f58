"""What the registry knows of the linear autoencoder of miniatures."""

from metacanvas_jax.vae.base import smallest_arguments
from metacanvas_jax.vae.patch_pca.network import PatchPca, PatchPcaConfig, fit
from metacanvas_jax.weights.record import Network

RECORD = Network(
    family="vae",
    name="patch_pca",
    config=PatchPcaConfig,
    module=PatchPca,
    arguments=smallest_arguments,
    tiny={"patch": 6, "channels": 16},
    fit=fit,
    licence=lambda config: ("OpenMoji drawings", "CC BY-SA 4.0"),
)
