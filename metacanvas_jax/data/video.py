"""Video files through PyAV (FFmpeg): decoded from bytes, frame by frame, within limits.

The container is known by its first bytes and no other demuxer is tried, so that a file cannot make FFmpeg open other
files or addresses (playlists can). What an MP4's tables claim is counted before FFmpeg allocates memory for it.
"""

import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from metacanvas_jax.config.sources import LIMITS, Limits
from metacanvas_jax.data.decoding import MediaError
from metacanvas_jax.data.transforms import AS_FOUND, Clip, causal_frames, fit_image
from metacanvas_jax.errors import UserError, first_line

_BOXES = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"}  # those that hold what is looked for
LONGEST_PAUSE = 600.0  # seconds between two frames; a damaged timestamp would repeat a frame for hours
_MOST_BOXES = 1 << 18  # a fragmented film of hours has tens of thousands


def container_of(data: bytes) -> str | None:
    """FFmpeg's name of the container these bytes are, None where they are no video that is read here."""
    if data[4:8] == b"ftyp":
        return "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"  # WebM too
    return None


def decode_video(data: bytes, clip: Clip = AS_FOUND, limits: Limits = LIMITS) -> tuple[np.ndarray, float]:
    """The frames of a clip, uint8 ``[t h w 3]``, and how many of them make a second.

    Raises MediaError for what is no MP4 or WebM, damaged, shorter than the clip, or beyond the limits; UserError when
    PyAV is not installed.
    """
    container = container_of(data)
    if container is None:
        raise MediaError("no MP4 or WebM video")
    if len(data) > limits.bytes:
        raise MediaError(f"a video of {len(data)} bytes, at most {limits.bytes} are allowed")
    if container == "mp4":
        check_claims(data, limits)
    av = _av()
    try:
        with av.open(io.BytesIO(data), format=container, options={"max_pixels": str(limits.pixels)}) as opened:
            if not opened.streams.video:
                raise MediaError("no video stream")
            stream = opened.streams.video[0]
            _check_size(stream.codec_context.width, stream.codec_context.height, limits)
            stream.codec_context.thread_count = 1  # the pipeline has its own threads
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            aspect = float(stream.sample_aspect_ratio or 1)
            return _take(_frames(opened, stream, rate, limits), rate, aspect, clip, limits)
    except (av.FFmpegError, OSError, ValueError, EOFError, IndexError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"no readable video ({first_line(error)})") from error


def _frames(opened: Any, stream: Any, rate: float, limits: Limits) -> Iterator[tuple[float, Any]]:
    """(seconds since the first frame, frame) in the order of showing."""
    first, before = None, 0.0
    for number, frame in enumerate(opened.decode(stream)):
        if number >= limits.frames:
            raise MediaError(f"more than {limits.frames} frames")
        _check_size(frame.width, frame.height, limits)
        time = frame.time if frame.time is not None else number / (rate or 1.0)
        first = time if first is None else first
        if time - first > before + LONGEST_PAUSE:
            raise MediaError(f"a pause of {time - first - before:.0f} s between two frames")
        before = time - first
        yield before, frame


def _take(
    frames: Iterator[tuple[float, Any]], rate: float, aspect: float, clip: Clip, limits: Limits
) -> tuple[np.ndarray, float]:
    """For every moment of the clip the frame that is shown then; decoding stops with the last of them."""
    fps = clip.fps or rate
    if not 0 < fps <= 1000:
        raise MediaError(f"{fps:g} frames per second")
    if clip.fps is None:
        frames = ((number / fps, frame) for number, (_, frame) in enumerate(frames))
    taken: list[np.ndarray] = []
    shown: Any = None
    pixels = 0
    slack = 1e-3 / fps  # timestamps are rounded to the container's clock

    def keep() -> None:
        nonlocal pixels
        _check_size(*square_size(shown.width, shown.height, aspect), limits)
        taken.append(fit_image(upright(shown, aspect), clip.size))
        pixels += taken[-1].shape[0] * taken[-1].shape[1]
        if pixels > limits.decoded_pixels:
            raise MediaError(f"{pixels} pixels in {len(taken)} frames, at most {limits.decoded_pixels} are allowed")

    for time, frame in frames:
        # Moments before this frame belong to the one shown until now.
        while shown is not None and _open(taken, clip) and len(taken) / fps < time - slack:
            keep()
        if not _open(taken, clip):
            break
        shown = frame
    if shown is not None and _open(taken, clip):
        keep()
    wanted = causal_frames(len(taken)) if clip.frames is None else clip.frames
    if not taken:
        raise MediaError("a video without frames")
    if len(taken) < wanted:
        raise MediaError(f"a video of {len(taken)} frames at {fps:g} per second, {wanted} are wanted")
    if len({frame.shape for frame in taken[:wanted]}) > 1:
        raise MediaError("the frames change their size")
    return np.stack(taken[:wanted]), fps


def upright(frame: Any, aspect: float) -> Image.Image:
    """A decoded frame as players show it: square pixels, and turned as the file's display matrix says.

    ``aspect`` is the width of a stored pixel over its height. One side is enlarged, none is shrunk.
    """
    image = frame.to_image()
    if (size := square_size(*image.size, aspect)) != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image.rotate(frame.rotation, expand=True) if frame.rotation % 360 else image


def square_size(width: int, height: int, aspect: float) -> tuple[int, int]:
    """Width and height of a frame whose pixels, of this width over height, have been made square."""
    if aspect <= 0 or abs(aspect - 1) <= 1e-3:
        return width, height
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def _open(taken: list[np.ndarray], clip: Clip) -> bool:
    return clip.frames is None or len(taken) < clip.frames


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1 or width * height > limits.pixels:
        raise MediaError(f"frames of {height} x {width} pixels, at most {limits.pixels} in all are allowed")


def check_claims(data: bytes, limits: Limits = LIMITS) -> None:
    """Raises MediaError when the tables of an MP4 claim more frames than allowed, or its boxes are damaged.

    A table may say "10^9 frames of equal size" in twelve bytes, for which FFmpeg would allocate an index.
    """
    claimed = 0
    pending = [(0, len(data))]
    boxes = 0
    while pending:
        at, end = pending.pop()
        while at + 8 <= end:
            boxes += 1
            size, kind = struct.unpack_from(">I4s", data, at)
            header = 8
            if size == 1 and at + 16 <= end:
                size, header = struct.unpack_from(">Q", data, at + 8)[0], 16
            size = size or end - at
            if size < header or boxes > _MOST_BOXES:
                raise MediaError("an MP4 with damaged boxes")
            stop = min(at + size, end)
            body = at + header
            if kind in _BOXES:
                pending.append((body, stop))
            elif kind in (b"stsz", b"stz2") and body + 12 <= stop:
                claimed += struct.unpack_from(">I", data, body + 8)[0]
            elif kind == b"trun" and body + 8 <= stop:
                claimed += struct.unpack_from(">I", data, body + 4)[0]
            at = stop
    if claimed > 16 * limits.frames:  # samples of sound count as well
        raise MediaError(f"an MP4 that claims {claimed} frames, at most {16 * limits.frames} are allowed")


def encode_mp4(frames: np.ndarray, fps: float) -> bytes:
    """Frames ``[t h w 3]`` (even sides) as an H.264 MP4 of high quality, in BT.709 and tagged so.

    The rate is kept to a thousandth of a frame per second. Raises UserError without PyAV.
    """
    av = _av()
    buffer = io.BytesIO()
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"crf": "12", "threads": "1"}
        context, bt709, limited = stream.codec_context, 1, 1  # FFmpeg's numbers: AVCOL_*_BT709, AVCOL_RANGE_MPEG
        context.colorspace = context.color_primaries = context.color_trc = bt709
        context.color_range = limited
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", src_color_range="JPEG"
            )
            frame.colorspace, frame.color_range = bt709, limited
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _av() -> Any:
    try:
        import av  # optional: the [media] extra
    except ImportError as error:
        raise UserError("videos need the package av: pip install 'metacanvas_jax[media]'") from error
    return av
