"""Serving the page: a private folder for uploads, bounds in front, and nothing that calls home."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..addresses import listen
from ..serving.limits import LimitMiddleware
from .engine import DemoEngine
from .examples import introduce


MULTIPART_BYTES = 100_000  # around an upload
UPLOAD_SECONDS = 120
MAX_SESSIONS = 256
TERMINATED = 143


def launch(
    engine: DemoEngine,
    name: str,
    host: str = "127.0.0.1",
    port: int | None = None,
    announce: Callable[[str], object] = print,
) -> None:
    """
    Serves the page until it is interrupted.

    Args:
        engine ([`DemoEngine`]): Does the work, within its limits.
        name (`str`): Folder or Hub id of its model; the embedded checkpoint comes with examples.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): Address to listen at.
        port (`int`, *optional*): Port to listen at, by default the first free one from 7860.
        announce (`Callable`, *optional*): Is told `Open` and the address when the page is there.

    Raises:
        OSError: if there is no such address here, or its port is taken.
    """
    listen(host, port or 0).close()  # Gradio tries a hundred ports, and its threads would stay behind
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(TERMINATED))  # so that uploads do not stay behind
    with tempfile.TemporaryDirectory(prefix="voco-llama-demo-") as temporary:
        folder = Path(temporary).resolve()
        # Gradio looks when it is imported, so the page comes after
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import gradio as gr
        from starlette.middleware import Middleware

        from .gate import UploadFolderOnly
        from .page import build_page

        limits = engine.limits
        bounds = replace(
            limits, max_request_bytes=limits.max_request_bytes + MULTIPART_BYTES, read_seconds=UPLOAD_SECONDS
        )
        middleware = [Middleware(LimitMiddleware, limits=bounds), Middleware(UploadFolderOnly, folder=folder)]
        page = build_page(engine, folder, *introduce(engine, name))
        page.queue(max_size=limits.max_queue, default_concurrency_limit=1)
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            max_file_size=limits.max_request_bytes,
            state_session_capacity=MAX_SESSIONS,
            app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None, "openapi_url": None},
            theme=gr.themes.Base(primary_hue="teal", neutral_hue="slate", radius_size="lg", font=FONT, font_mono=MONO),
            css_paths=Path(__file__).parent / "style.css",
        )
        announce(f"Open {address}")
        page.block_thread()


# Those of the visitor's system: nothing is fetched from elsewhere
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]


__all__ = ["launch"]
