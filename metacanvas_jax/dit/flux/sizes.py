"""The sizes in which FLUX.1-Kontext is best asked to draw.

Source: diffusers 0.42.1 ``pipelines/flux/pipeline_flux_kontext.py``, ``PREFERRED_KONTEXT_RESOLUTIONS``. The pipeline
takes the one whose ratio of sides differs least from the source's; `metacanvas_jax.sizes.nearest_size` compares the
logarithms of the ratios, so that wide and tall pictures are treated alike.
"""

KONTEXT_SIZES: tuple[tuple[int, int], ...] = (
    (1024, 1024),
    *((944, 1104), (1104, 944)),
    *((880, 1184), (1184, 880)),
    *((832, 1248), (1248, 832)),
    *((800, 1328), (1328, 800)),
    *((752, 1392), (1392, 752)),
    *((720, 1456), (1456, 720)),
    *((688, 1504), (1504, 688)),
    *((672, 1568), (1568, 672)),
)
"""(rows, columns), the square first: all have about a megapixel, and sides that are multiples of 16."""
