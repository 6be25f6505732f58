"""The sizes in which Qwen-Image-Edit draws the aspect ratios that Qwen-Image's model card names.

Source: the model card of Qwen-Image for the ratios 1:1, 4:3, 3:2, 16:9 and their reverses; diffusers 0.42.1
``pipelines/qwenimage/pipeline_qwenimage_edit_plus.py``, ``calculate_dimensions``, for the sides of each: an area of
1024 x 1024 pixels, in multiples of 32.
"""

EDIT_SIZES: tuple[tuple[int, int], ...] = (
    (1024, 1024),
    *((896, 1184), (1184, 896)),
    *((832, 1248), (1248, 832)),
    *((768, 1376), (1376, 768)),
)
"""(rows, columns), the square first."""
