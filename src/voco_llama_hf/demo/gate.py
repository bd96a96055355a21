"""What the page's server hands out and takes in, whatever Gradio is told by its environment."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like

from ..serving.limits import Receive, Send, refuse


FILE_ROUTES = ("/gradio_api/file=", "/gradio_api/file/")
# Of no use here, and each fetches, converts or edits something
CLOSED_ROUTES = ("/gradio_api/proxy=", "/gradio_api/process_recording", "/gradio_api/vibe", "/gradio_api/deep_link")


class UploadFolderOnly:
    """
    ASGI layer that answers 403 to whoever asks for a file outside of a folder, or for a URL to be fetched.

    Args:
        app (`Any`): The application behind it.
        folder (`Path`): Where uploads and written files are.
    """

    def __init__(self, app: Any, folder: Path):
        self.app = app
        self.folder = folder.resolve()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self.allows(scope["path"]):
            return await refuse(send, 403, "there is nothing to be read here")
        await self.app(scope, receive, send)

    def allows(self, path: str) -> bool:
        """Whether a path of a request may be answered."""
        # Wherever they stand: a proxy may put a prefix in front
        if any(route in path for route in CLOSED_ROUTES):
            return False
        for route in FILE_ROUTES:
            _, found, name = path.partition(route)
            try:
                if found and not Path(name).resolve().is_relative_to(self.folder):
                    return False
            except (OSError, ValueError):  # no path at all
                return False
        return True


class Upload(gr.File):
    """A file that a visitor uploads. Gradio's own would also fetch URLs, of any size."""

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        return None if payload is None else payload.path

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        if url_or_file_path is not None and is_http_url_like(str(url_or_file_path)):
            raise gr.Error("URLs are not fetched: upload the file itself", print_exception=False)
        return await super().async_move_resource_to_block_cache(url_or_file_path)


__all__ = ["Upload", "UploadFolderOnly"]
