"""Small video files that tests write: `from video_files import write_video`."""

from pathlib import Path

import av
import numpy as np


def make_frames(num_frames: int, noise: bool = False) -> np.ndarray:
    """`(num_frames, 48, 64, 3)`: a grey that brightens from frame to frame, or noise."""
    if noise:
        return np.random.default_rng(0).integers(0, 255, (num_frames, 48, 64, 3), dtype=np.uint8)
    ramp = np.linspace(20, 230, num_frames).astype(np.uint8)
    frames = np.broadcast_to(ramp[:, None, None, None], (num_frames, 48, 64, 3)).copy()
    frames[:, :, 32:] = 128
    return frames


def write_video(path: Path, frames: np.ndarray, rate: int = 10, options: dict | None = None) -> Path:
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
