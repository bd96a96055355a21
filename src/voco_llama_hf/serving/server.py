"""The application: transformers' server, its routes that are of use here, and errors in OpenAI's format."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from ..modeling.fingerprint_voco_llama import with_images
from .chat_completion import VoCoChatCompletionHandler
from .image_cache import ImageCache
from .limits import LimitMiddleware, Limits, error_body
from .model_manager import VoCoModelManager
from .remote_images import ImageLoader


ROUTES = ("/v1/chat/completions", "/v1/models", "/health")


def build_app(
    model: Any,
    processor: Any,
    model_id: str,
    limits: Limits | None = None,
    image_cache_bytes: int = 256_000_000,
    store: Path | None = None,
    allow_remote_images: bool = False,
) -> Any:
    """
    An ASGI application that answers like OpenAI's API.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]):
            Model that answers.
        processor ([`VoCoLlamaProcessor`]):
            Its processor, with a chat template.
        model_id (`str`):
            What clients call it.
        limits ([`Limits`], *optional*):
            Bounds of a request and of all together.
        image_cache_bytes (`int`, *optional*, defaults to 256,000,000):
            Bytes of compressed images to keep in memory.
        store (`Path`, *optional*):
            Folder of a [`VoCoStore`] to keep them in as well.
        allow_remote_images (`bool`, *optional*, defaults to `False`):
            Whether images are fetched from public addresses.

    Raises:
        ValueError: if the processor has no chat template, or the store is of another model.
    """
    if processor.chat_template is None:
        raise ValueError(f"{model_id} has no chat template, which chat completions need")
    limits = limits or Limits()
    made_by = with_images(model.fingerprint(), processor.image_processor)
    images = ImageCache(image_cache_bytes, store, made_by)
    manager = VoCoModelManager(model, processor, model_id)
    state = GenerationState()
    if store is not None:
        # A store that cannot be used is an error now, not at the first request
        state.get_manager(model_id).submit(images.open_store).result()  # type: ignore[attr-defined]
    loader = ImageLoader(allow_remote_images, limits.max_request_bytes)
    chat = VoCoChatCompletionHandler(manager, state, images, loader, limits)
    unused: Any = None
    app: FastAPI = build_server(manager, chat, unused, unused, unused, unused, generation_state=state)
    # The others would load any model that a request names, or forget this one
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    app.add_exception_handler(HTTPException, answer_error)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(Exception, answer_failure)
    return LimitMiddleware(app, limits)


async def answer_error(request: Any, error: Any) -> JSONResponse:
    return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code)


async def answer_invalid(request: Any, error: Any) -> JSONResponse:
    return JSONResponse(error_body(400, "the body of a request is a JSON object"), 400)


async def answer_failure(request: Any, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(500, "the server failed to answer; its log says why"), 500)


__all__ = ["build_app"]
