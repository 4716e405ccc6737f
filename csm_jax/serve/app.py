"""The application: one service, the routes of all APIs, and the middleware around them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from csm_jax.errors import InputError
from csm_jax.inference.generator import Generator, load
from csm_jax.loading import find_directory
from csm_jax.model.kernels.choice import XLA
from csm_jax.serve import errors
from csm_jax.serve.api import (
    batches,
    chat,
    deepinfra,
    elevenlabs,
    fal,
    health,
    openai,
    page,
    parsing,
    realtime,
    voices,
    voxserve,
)
from csm_jax.serve.api.batch_worker import BatchWorker
from csm_jax.serve.middleware import redaction
from csm_jax.serve.middleware.authentication import AuthenticationMiddleware
from csm_jax.serve.middleware.body_limits import BodyLimitMiddleware
from csm_jax.serve.middleware.head import HeadMiddleware
from csm_jax.serve.middleware.host_and_origin import HostOriginMiddleware
from csm_jax.serve.middleware.request_log import RequestLogMiddleware
from csm_jax.serve.middleware.response_limits import ResponseLimitMiddleware
from csm_jax.serve.middleware.security_headers import SecurityHeadersMiddleware
from csm_jax.serve.service import Service
from csm_jax.serve.settings import Settings
from csm_jax.serve.store import Store
from csm_jax.serve.voices.presets import find_presets
from csm_jax.watermark import Watermark

DESCRIPTION = """Speech from text and the conversation so far, by CSM-1B. All APIs are answered by
one engine. Do not use it to impersonate people without their consent, to deceive, or for anything
illegal or harmful."""


def load_app(
    checkpoint: str,
    settings: Settings,
    dtype: str = "auto",
    quantize: str | None = None,
    adapters: str | None = None,
    watermark: Watermark | None = None,
    kernels: str = XLA,
) -> FastAPI:
    """Loads a checkpoint, and makes the application with the voices in its directory `prompts`.

    Arguments and errors are those of `csm_jax.load`. `InputError`, `OutputError` or `StorageError`
    is also raised if a directory of the settings cannot be used.
    """
    # Checked before the model is loaded, which takes a while.
    if settings.voices is not None and not settings.voices.is_dir():
        raise InputError(f"--voices is {str(settings.voices)!r}, which is not a directory")
    store = Store(settings.data, settings.limits)
    try:
        model = load(checkpoint, dtype, quantize, adapters=adapters, kernels=kernels)
        presets = find_presets(checkpoint, find_directory(checkpoint))
        return create_app(model, settings, presets, store, watermark)
    except BaseException:
        store.close()
        raise


def create_app(
    model: Generator,
    settings: Settings,
    presets: Sequence[Path] = (),
    store: Store | None = None,
    watermark: Watermark | None = None,
) -> FastAPI:
    """Makes the ASGI application, with its `Service` as `app.state.service`.

    Args:
      presets: directories of voices that come with the model.
      store: the opened store of these settings; by default it is opened here. It is closed with
        the application.
      watermark: marks all speech.
    """
    redaction.install()
    service = Service(model, settings, presets, store, watermark)
    worker = BatchWorker(service)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.warmed = asyncio.create_task(service.warm_up())
        await service.jobs.start()
        work = (service.warmed, worker.run(), service.store.tidy(), service.read_pace.run())
        tasks = [asyncio.ensure_future(each) for each in work]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await service.close()

    app = FastAPI(
        title="csm-jax",
        version=version("csm-jax"),
        description=DESCRIPTION,
        lifespan=lifespan,
        # FastAPI's pages load scripts from other hosts.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    _add_routes(app, service, worker)
    _add_middleware(app, service)
    return app


def _add_routes(app: FastAPI, service: Service, worker: BatchWorker) -> None:
    for module in (health, voxserve, openai, chat, deepinfra, elevenlabs, fal, realtime, voices):
        app.include_router(module.router(service))
    app.include_router(batches.router(service, worker))
    app.include_router(page.router())
    errors.install(app)
    parsing.document(app)


def _add_middleware(app: FastAPI, service: Service) -> None:
    """Adds the middleware; what is added last is the outermost."""
    settings = service.settings
    origins, hostnames = settings.cors_origins, settings.allowed_hosts
    app.add_middleware(BodyLimitMiddleware, limits=settings.limits)
    app.add_middleware(ResponseLimitMiddleware, limits=settings.limits)
    app.add_middleware(AuthenticationMiddleware, keys=service.keys, rate_limits=service.rate_limits)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(HostOriginMiddleware, allowed_hosts=hostnames, origins=origins)
    if settings.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(settings.trusted_proxies))
    app.add_middleware(HeadMiddleware)
    app.add_middleware(SecurityHeadersMiddleware, cors_origins=settings.cors_origins)
    app.add_middleware(RequestLogMiddleware, metrics=service.metrics)
