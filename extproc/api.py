"""The control API: what runs, whether it is ready, what Envoy counts. Reads only; knows nothing but its callables."""

import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError

log = logging.getLogger("perch.api")
"""For the server under the API: what its clients do wrong is a line each."""

dumps = partial(json.dumps, indent=1)
PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
MAX_REASON = 200

UNREADABLE = (HttpProcessingError, web.RequestPayloadError)
"""What reading a request raises that is no HTTP, or whose body is not in the encoding that it names."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the answers come from. `envoy_stats` takes Envoy's own query string; it raises OSError without Envoy.

    `routes` are those of other modules, `outcomesapi.outcome_routes` for one.
    """

    status: Callable[[], Awaitable[dict[str, Any]]]
    not_ready: Callable[[], str | None]
    envoy_stats: Callable[[str], Awaitable[tuple[str, bytes]]]
    metrics: Callable[[], bytes]
    routes: Sequence[web.RouteDef] = ()


def make_api(sources: Sources) -> web.Application:
    """The application: `/livez`, `/readyz`, `/v1/status`, `/envoy/stats`, `/metrics`."""

    async def livez(_request: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def readyz(_request: web.Request) -> web.Response:
        missing = sources.not_ready()
        return web.Response(text="ready\n") if missing is None else web.Response(status=503, text=f"{missing}\n")

    async def status(_request: web.Request) -> web.Response:
        return web.json_response(await sources.status(), dumps=dumps)

    async def envoy_stats(request: web.Request) -> web.Response:
        try:
            content_type, body = await sources.envoy_stats(request.rel_url.raw_query_string)
        except OSError as error:
            return web.json_response({"error": str(error)}, status=502)
        return web.Response(body=body, headers={"content-type": content_type})

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=sources.metrics(), headers={"content-type": PROMETHEUS_TEXT})

    app = web.Application(client_max_size=1 << 20)
    app.add_routes(
        [
            web.get("/livez", livez),
            web.get("/readyz", readyz),
            web.get("/v1/status", status),
            web.get("/envoy/stats", envoy_stats),
            web.get("/metrics", metrics),
            *sources.routes,
        ]
    )
    return app


def reason_of(error: BaseException) -> str:
    """Why reading a request failed, in one line: the server's message may have several, with bytes of the request."""
    lines = (line.strip().rstrip(":") for line in str(error).splitlines())
    return next((line[:MAX_REASON] for line in lines if line and not line.endswith("message")), type(error).__name__)


def _in_one_line(record: logging.LogRecord) -> bool:
    """A filter that takes the traceback away where the client is at fault; a fault of this program keeps its own."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, UNREADABLE):
        record.msg, record.args = "a request cannot be read: %s", (reason_of(error),)
        record.levelno = min(record.levelno, logging.WARNING)
        record.levelname = logging.getLevelName(record.levelno)
        record.exc_info = record.exc_text = None
    return True


log.addFilter(_in_one_line)
