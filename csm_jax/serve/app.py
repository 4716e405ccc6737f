"""The application: all routes around one service, and the layers around them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from csm_jax.errors import InputError
from csm_jax.generator import Generator, load
from csm_jax.loading import find_directory
from csm_jax.serve import errors
from csm_jax.serve.api import (
    batches,
    deepinfra,
    fal,
    health,
    openai,
    page,
    parsing,
    realtime,
    voxserve,
)
from csm_jax.serve.api import voices as voice_routes
from csm_jax.serve.middleware import authentication as keys
from csm_jax.serve.middleware import body_limits as bodies
from csm_jax.serve.middleware import head, redaction
from csm_jax.serve.middleware import host_and_origin as hosts
from csm_jax.serve.middleware import response_limits as responses
from csm_jax.serve.middleware.request_log import RequestLog
from csm_jax.serve.middleware.security_headers import SecurityHeaders
from csm_jax.serve.service import Service
from csm_jax.serve.settings import Settings
from csm_jax.serve.store import Store
from csm_jax.serve.voices.presets import find_presets

DESCRIPTION = """Speech from text and the conversation so far, by CSM-1B. All APIs are answered by
one engine. Do not use it to impersonate people without their consent, to deceive, or for anything
illegal or harmful."""


def load_app(
    checkpoint: str,
    settings: Settings,
    dtype: str = "auto",
    quantize: str | None = None,
    adapters: str | None = None,
) -> FastAPI:
    """The application of a checkpoint, with the voices in its directory `prompts`.

    Args and errors: those of `csm_jax.load`; besides, the data directory cannot be used, or there
    is no directory of voices.
    """
    # What can be refused at once, before the model is loaded, which takes a while.
    if settings.voices is not None and not settings.voices.is_dir():
        raise InputError(f"--voices is {str(settings.voices)!r}, which is no directory")
    store = Store(settings.data, settings.limits)
    try:
        model = load(checkpoint, dtype, quantize, adapters=adapters)
        presets = find_presets(checkpoint, find_directory(checkpoint))
        return create_app(model, settings, presets, store)
    except BaseException:
        store.close()
        raise


def create_app(
    model: Generator, settings: Settings, presets: Sequence[Path] = (), store: Store | None = None
) -> FastAPI:
    """An ASGI application, with its `Service` as `app.state.service`.

    Args:
      presets: directories of voices that come with the model.
      store: opened for these settings; default: opens it. It is closed with the application.
    """
    redaction.install()
    service = Service(model, settings, presets, store)
    worker = batches.Worker(service)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.warmed = asyncio.create_task(service.warm_up())
        await service.jobs.start()
        work = (service.warmed, worker.run(), service.store.tidy(), service.readers.run())
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
        # Their pages are scripts from other hosts.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    _add_routes(app, service, worker)
    _add_middleware(app, service)
    return app


def _add_routes(app: FastAPI, service: Service, worker: batches.Worker) -> None:
    for module in (health, voxserve, openai, deepinfra, fal, realtime, voice_routes):
        app.include_router(module.router(service))
    app.include_router(batches.router(service, worker))
    app.include_router(page.router())
    errors.install(app)
    parsing.document(app)


def _add_middleware(app: FastAPI, service: Service) -> None:
    """Adds the layers around the routes; the last is the outermost."""
    settings = service.settings
    origins, hostnames = settings.cors_origins, settings.allowed_hosts
    app.add_middleware(bodies.Bodies, limits=settings.limits)
    app.add_middleware(responses.Responses, limits=settings.limits)
    app.add_middleware(keys.Keys, keys=service.keys, quotas=service.quotas)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(hosts.Hosts, allowed_hosts=hostnames, origins=origins)
    if settings.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(settings.trusted_proxies))
    app.add_middleware(head.Head)
    app.add_middleware(SecurityHeaders, cors_origins=settings.cors_origins)
    app.add_middleware(RequestLog, metrics=service.metrics)
