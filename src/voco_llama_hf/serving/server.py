"""The application: its routes, who may call them, and errors in OpenAI's format."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..modeling.fingerprint_voco_llama import with_images
from ..prompts import check_text_length, render
from ..store import VoCoStore
from .access import AccessMiddleware
from .chat_completion import ChatCompletions
from .engine import Engine
from .image_cache import ImageCache
from .limits import App, LimitMiddleware, Limits, error_body
from .remote_images import ImageLoader


REQUEST_ID, MAX_REQUEST_ID = "x-request-id", 128


def build_app(
    model: VoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor,
    model_id: str,
    limits: Limits | None = None,
    image_cache_bytes: int = 256_000_000,
    store: Path | None = None,
    allow_remote_images: bool = False,
    allowed_hosts: Sequence[str] = (),
    api_keys: Sequence[str] = (),
) -> App:
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
        allowed_hosts (`Sequence[str]`, *optional*):
            Names in the `Host` header that are answered, besides addresses and `localhost`; `"*"` is any.
        api_keys (`Sequence[str]`, *optional*):
            Keys of which a request must bring one. Without any, none is asked for.

    Raises:
        ValueError: if the processor has no chat template or one that fails, or the store is of another model.
    """
    if processor.chat_template is None:
        raise ValueError(f"{model_id} has no chat template, which chat completions need")
    greeting = render([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], processor)
    check_text_length(greeting, processor, model.config.text_config.max_position_embeddings)
    limits = limits or Limits()
    made_by = with_images(model.fingerprint(), processor.image_processor)
    if store is not None:
        # A store that cannot be used is an error now, not at the first request
        VoCoStore(store, made_by).close()
    engine = Engine(model, processor, ImageCache(image_cache_bytes, store, made_by))
    loader = ImageLoader(allow_remote_images)
    app = build_routes(model_id, engine, ChatCompletions(model_id, engine, loader, limits))
    return AccessMiddleware(LimitMiddleware(app, limits), allowed_hosts, api_keys)


def build_routes(model_id: str, engine: Engine, chat: ChatCompletions) -> FastAPI:
    """The application without what stands in front of it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    about = {"id": model_id, "object": "model", "created": int(time.time()), "owned_by": "voco-llama-hf"}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        request_id = request.headers.get(REQUEST_ID, "")[:MAX_REQUEST_ID] or f"chatcmpl-{uuid.uuid4().hex}"
        response = await chat.answer(request, request_id)
        response.headers[REQUEST_ID] = request_id
        return response

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [about]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name != model_id:
            raise HTTPException(404, f"this server has the model {model_id!r}")
        return JSONResponse(about)

    @app.get("/health")
    async def health() -> Response:
        if not engine.is_alive:
            return JSONResponse({"status": "unhealthy"}, 503)
        return JSONResponse({"status": "ok"})

    app.add_exception_handler(HTTPException, answer_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, answer_failure)
    return app


async def answer_error(request: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code)


async def answer_failure(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(500, "the server failed to answer; its log says why"), 500)


__all__ = ["build_app"]
