"""With `VOCO_LLAMA_TEST_DEVICE=cuda` these tests run on a GPU: whatever names no device is made there."""

import os

import torch


DEVICE = os.environ.get("VOCO_LLAMA_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
    torch.backends.cudnn.allow_tf32 = False  # what is compared to 1e-4 is computed in float32
