"""Pictures of any colour mode as RGB pixels in sRGB. The one place where colour profiles and transparency are read."""

import io

from PIL import Image, ImageCms

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits per channel or fewer


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB and sRGB; what is transparent lies on white.

    An embedded ICC profile is applied. A profile that is damaged, or of other channels than the picture has, is
    ignored, as viewers do. White is what transformers' ``convert_to_rgb`` lays transparent pictures on.
    """
    profile = image.info.get("icc_profile")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        colours = _to_srgb(image.convert("RGB"), profile)
        white = Image.new("RGB", image.size, "white")
        return Image.composite(colours, white, image.getchannel("A"))
    if image.mode in ("1", "P", "YCbCr"):
        image = image.convert("RGB")
    return _to_srgb(image, profile).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
