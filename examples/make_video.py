"""Writes a short video to ask about: an orange square on black that wanders from left to right.

python examples/make_video.py film.mp4
"""

import sys

import av
import numpy as np


SIZE, NUM_FRAMES = 64, 24


def main(path: str) -> None:
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for i in range(NUM_FRAMES):
            frame = np.zeros((SIZE, SIZE, 3), np.uint8)
            left = i * (SIZE - 16) // (NUM_FRAMES - 1)
            frame[24:40, left : left + 16] = (255, 140, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


main(*sys.argv[1:])
