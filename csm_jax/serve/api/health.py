"""Routes for health probes and Prometheus."""

from fastapi import APIRouter, Response

from csm_jax.serve.errors import ApiError
from csm_jax.serve.metrics import CONTENT_TYPE
from csm_jax.serve.service import Service


def router(service: Service) -> APIRouter:
    """The routes of health probes and metrics."""
    routes = APIRouter(tags=["Health"])

    @routes.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process runs, and its engine too."""
        if _has_stopped(service):
            raise ApiError(503, "the engine has stopped: restart the server", code="stopped")
        return {"status": "ok"}

    @routes.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Everything is compiled, a first request has succeeded, and the server is not closing."""
        why = "the engine has stopped" if _has_stopped(service) else service.not_ready
        if why is not None:
            raise ApiError(503, f"not ready: {why}", code="not_ready", retry_after=2)
        if service.store.problem is not None:
            message = f"not ready: {service.store.problem}"
            raise ApiError(503, message, code="storage_failed", retry_after=10)
        # A full disk stops only requests that store something.
        return {"status": "ready"} | ({"storage": "full"} if service.store.database.is_full else {})

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return routes


def _has_stopped(service: Service) -> bool:
    """Whether the engine's thread has ended by an error, and not because the server closes."""
    return not service.engine.is_alive and not service.deadline.is_started
