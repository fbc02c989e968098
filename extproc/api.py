"""The control API: what runs, whether it is ready, what Envoy counts. Reads only; knows nothing but its callables."""

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiohttp import web

dumps = partial(json.dumps, indent=1)
PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


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
