"""What the page's server hands out and takes in, whatever Gradio is told by its environment."""

from pathlib import Path

import gradio as gr
from gradio_client.utils import is_http_url_like

from ..serving.limits import App, Receive, Scope, Send, refuse


FILE_ROUTES = ("/gradio_api/file=", "/gradio_api/file/")
# Of no use here, and each fetches, converts or edits something
CLOSED_ROUTES = ("/gradio_api/proxy=", "/gradio_api/process_recording", "/gradio_api/vibe", "/gradio_api/deep_link")


class UploadFolderOnly:
    """
    ASGI layer that answers 403 to whoever asks for a file outside of a folder, or for a URL to be fetched.

    Args:
        app (`Callable`): The application behind it.
        folder (`Path`): Where uploads and written files are.
    """

    def __init__(self, app: App, folder: Path):
        self.app = app
        self.folder = folder.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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


def uploads_only(file: gr.File) -> gr.File:
    """
    Makes a component take what visitors upload. Left alone it would also fetch URLs that it is given, of any size, and
    leave an empty file behind for every event. (Next to a class of its own Gradio would write an
    interface file.)
    """
    move = file.async_move_resource_to_block_cache

    async def move_uploaded(path: str | Path | None) -> str | None:
        if path is not None and is_http_url_like(str(path)):
            raise gr.Error("URLs are not fetched: upload the file itself", print_exception=False)
        return await move(path)

    def preprocess(payload: gr.FileData | None) -> str | None:
        return None if payload is None else payload.path

    file.async_move_resource_to_block_cache = move_uploaded  # type: ignore[assignment, method-assign]
    file.preprocess = preprocess  # type: ignore[assignment, method-assign]
    return file


__all__ = ["UploadFolderOnly", "uploads_only"]
