"""Frames that are put side by side, captioned, and written to files by Pillow or moviepy."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

STRIP = 18  # the height of a caption, in pixels
GAP = 4  # between two panels
_LABEL = 42  # the width of the names of rows


def save_video(
    path: str | os.PathLike, frames: np.ndarray, *, fps: float = 20.0
) -> Path:
    """Write frames as a GIF or an MP4, as the file's ending says.

    Args:
        path: ends in ``.gif`` (needs Pillow) or ``.mp4`` (needs moviepy). An existing file is
            replaced once the new one is complete.
        frames: ``[T, height, width, 3]`` uint8.
        fps: frames a second.

    Returns:
        The path.

    Raises:
        ValueError: for other endings, or if ``frames`` have another shape or dtype.
        ImportError: if Pillow or moviepy is missing; the message names the extra to install.

    Examples:
        >>> import numpy as np
        >>> import os, tempfile
        >>> from torchrl_wm.diagnostics import save_video
        >>> path = os.path.join(tempfile.mkdtemp(), "grey.gif")
        >>> os.path.basename(save_video(path, np.full((3, 8, 8, 3), 127, dtype=np.uint8)))
        'grey.gif'
    """
    path = Path(path)
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"frames must be [T, height, width, 3] uint8, got {frames.shape} {frames.dtype}."
        )
    if not frames.size:
        raise ValueError(f"There is nothing to write: frames of shape {frames.shape}.")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}.")
    writers = {".gif": _write_gif, ".mp4": _write_mp4}
    ending = path.suffix.lower()
    if ending not in writers:
        raise ValueError(
            f"The ending of {os.fspath(path)!r} must be one of {list(writers)}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / f"film{ending}"
        writers[ending](whole, frames, fps)
        os.replace(whole, path)
    return path


def gif(frames: np.ndarray, fps: float = 20.0) -> bytes:
    """Return frames ``[T, height, width, 3]`` uint8 as the bytes of a GIF file."""
    with tempfile.TemporaryDirectory() as folder:
        return save_video(Path(folder) / "film.gif", frames, fps=fps).read_bytes()


def png(frame: np.ndarray) -> bytes:
    """Return a frame ``[height, width, 3]`` uint8 as the bytes of a PNG file."""
    file = io.BytesIO()
    _pillow().Image.fromarray(frame).save(file, format="PNG")
    return file.getvalue()


def separated(frames: list[np.ndarray]) -> list[np.ndarray]:
    """Return frames ``[*B, height, width, 3]`` with white gaps to put between them, side by side."""
    gap = np.full((*frames[0].shape[:-2], GAP, 3), 255, np.uint8)
    out = [frames[0]]
    for frame in frames[1:]:
        out += [gap, frame]
    return out


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError as err:
        raise ImportError(
            "Captions, other sizes and GIFs need Pillow, which comes with matplotlib: "
            "pip install 'torchrl-wm[plot]'. Frames as they are: captions=False, height=None."
        ) from err
    return PIL


def resized(frames: np.ndarray, height: int) -> np.ndarray:
    """Return frames ``[T, height, width, 3]`` of another height, in the same proportions."""
    if frames.shape[1] == height:
        return frames
    pil = _pillow()
    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    # Enlarged pixels stay sharp; reduced ones are averaged.
    how = pil.Image.NEAREST if height > frames.shape[1] else pil.Image.BOX
    images = (pil.Image.fromarray(frame) for frame in frames)
    return np.stack(
        [np.asarray(image.resize((width, height), how)) for image in images]
    )


def captioned(frame: np.ndarray, texts: list[str], width: int) -> np.ndarray:
    """Return the frame under a strip with one text above each panel."""
    pil = _pillow()
    strip = pil.Image.new("RGB", (frame.shape[1], STRIP), "white")
    draw = pil.ImageDraw.Draw(strip)
    for number, text in enumerate(texts):
        room = width - GAP - 4
        for size in range(12, 5, -1):
            font = pil.ImageFont.load_default(size)
            if draw.textlength(text, font=font) <= room:
                break
        draw.text((number * width + 2, 2), text, fill="black", font=font)
    return np.concatenate([np.asarray(strip), frame])


def labelled(names: list[str], height: int) -> np.ndarray:
    """Return a strip with the names of rows that are ``height`` pixels high each."""
    pil = _pillow()
    font = pil.ImageFont.load_default(12)
    strip = pil.Image.new("RGB", (_LABEL, height * len(names)), "white")
    draw = pil.ImageDraw.Draw(strip)
    for number, name in enumerate(names):
        draw.text(
            (3, (number + 0.5) * height), name, fill="black", font=font, anchor="lm"
        )
    return np.asarray(strip)


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    pil = _pillow()
    images = [pil.Image.fromarray(frame) for frame in frames]
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=max(20, round(1000 / fps)),  # viewers slow faster ones down
        loop=0,
        optimize=True,
    )


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    try:
        from moviepy.video.io.ImageSequenceClip import ImageSequenceClip
    except ImportError as err:
        raise ImportError(
            "MP4 needs moviepy: pip install 'torchrl-wm[render]'. A .gif needs only Pillow."
        ) from err
    # The codec takes only even sizes.
    bottom, right = frames.shape[1] % 2, frames.shape[2] % 2
    frames = np.pad(frames, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")
    clip = ImageSequenceClip(list(frames), fps=fps)
    clip.write_videofile(str(path), codec="libx264", audio=False, logger=None)
