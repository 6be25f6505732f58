"""The prompts on which the published transformers were trained, by the class of their pipeline in diffusers.

Source: diffusers 0.42.1 ``pipelines/qwenimage``. Their text encoder is Qwen2.5-VL-7B. The transformer does not read the
states of the system prompt and of the words before the user's: ``skip`` counts them. ``image_tokens`` are those of a
square image: of 1024 pixels a side in the first editing pipeline, of 384 in the second.
"""

from metacanvas_jax.weights.record import NativePrompt

DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
INSTRUCT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
TEXT_TO_IMAGE = NativePrompt(system=DESCRIBE, skip=34)
EDIT = NativePrompt(system=INSTRUCT, skip=64, image_tokens=37 * 37)
EDIT_PLUS = NativePrompt(system=INSTRUCT, skip=64, image_label="Picture {}: ", image_tokens=14 * 14)

PROMPTS = {
    "QwenImagePipeline": TEXT_TO_IMAGE,
    "QwenImageEditPipeline": EDIT,
    "QwenImageEditPlusPipeline": EDIT_PLUS,
}
