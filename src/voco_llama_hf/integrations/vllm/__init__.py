"""
VoCo-LLaMA as a model of vLLM, which finds it by the entry point `vllm.general_plugins`.

The model compresses images on vLLM's own layers and puts the result among keys and values on their way into the paged
cache, where an image is k ordinary tokens. `renderer.py` and `processing.py` run where requests arrive, `model.py`
and `injection.py` where the weights are; `stored_images.py` is what a client needs, and imports nothing of vLLM.
"""

from .stored_images import image_part


__all__ = ["image_part"]
