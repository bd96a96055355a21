"""A Hugging Face Space of `voco-llama demo`. The variable MODEL names another model than the package's own."""

import os

from voco_llama_cli.demo import demo


demo(
    model=os.environ.get("MODEL"),
    host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
    port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
)
