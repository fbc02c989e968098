"""The HTTP surface: which path answers what. Owns no rule of the protocol and no life cycle.

aiohttp's low-level server is used without its router and middlewares: the paths are few and fixed, and a third of the
time of a small inference would be spent there.
"""

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from aiohttp import web

from model_servers.errors import Refused
from model_servers.model import Model
from model_servers.protocol import prediction_headers, read_inference, write_answer

log = logging.getLogger("model_servers")
LARGEST_BODY_BYTES = 64 << 20
SERVER = {"name": "perch-model-server", "version": "0.1.0", "extensions": ["model_repository"]}


@dataclass(slots=True)
class State:
    """What the process may do right now; changed by the life cycle, read by every request."""

    model: Model
    name: str  # in the path; may differ from the manifest's
    warm: bool = False
    draining: bool = False

    @property
    def ready(self) -> bool:
        """Whether new traffic should come here."""
        return self.warm and not self.draining


async def answer(state: State, request: web.BaseRequest) -> web.StreamResponse:
    """One request to one response; a client's mistake is a 4xx with a sentence, ours a 500 without a traceback."""
    try:
        response = await _dispatch(state, request)
    except Refused as refusal:
        response = _error(refusal.status, str(refusal))
    except web.HTTPRequestEntityTooLarge:
        limit = f"{LARGEST_BODY_BYTES >> 20} MiB"
        response = _error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {limit}")
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception:
        log.exception("inference failed")
        response = _error(HTTPStatus.INTERNAL_SERVER_ERROR, "the model failed; the server's log says why")
    if state.draining:
        response.force_close()
    return response


async def _dispatch(state: State, request: web.BaseRequest) -> web.Response:
    path = request.path.rstrip("/")
    model = f"/v2/models/{state.name}"
    if path == f"{model}/infer":
        return await _infer(state, request)
    _require_method(request, "GET", "HEAD")
    match path:
        case "/v2":
            return _json(SERVER)
        case "/v2/health/live":
            return _json({"live": True})
        case "/v2/health/ready":
            return _readiness(state)
    if path == model:
        return _json(_metadata(state))
    if path == f"{model}/ready":
        return _readiness(state)
    raise Refused(f"no such path: {path or '/'}; this server has the model {state.name!r}", HTTPStatus.NOT_FOUND)


async def _infer(state: State, request: web.BaseRequest) -> web.Response:
    _require_method(request, "POST")
    content_type = request.headers.get("Content-Type", "application/json")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Refused(f"content type {content_type!r}; send application/json", HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
    await _allow_continue(request)
    body = await request.read()
    model = state.model
    inference = read_inference(body, model.manifest)
    outputs = model.predict(inference.inputs)
    return web.Response(
        body=write_answer(inference, outputs, model.manifest),
        headers={"Content-Type": "application/json", **prediction_headers(model.manifest, outputs)},
    )


async def _allow_continue(request: web.BaseRequest) -> None:
    """Tells a client that waits for it (curl, above 1 MB) to send the body; the low-level server leaves it to us."""
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _require_method(request: web.BaseRequest, *methods: str) -> None:
    if request.method not in methods:
        raise Refused(f"{request.method} is not allowed here; use {methods[0]}", HTTPStatus.METHOD_NOT_ALLOWED)


def _readiness(state: State) -> web.Response:
    if state.ready:
        return _json({"ready": True})
    reason = "draining" if state.draining else "warming up"
    return _json({"ready": False, "reason": reason}, HTTPStatus.SERVICE_UNAVAILABLE)


def _metadata(state: State) -> dict[str, Any]:
    manifest = state.model.manifest
    return {
        "name": state.name,
        "versions": [manifest.version],
        "platform": f"perch_{manifest.backend}",
        "inputs": [spec.metadata() for spec in manifest.inputs],
        "outputs": [spec.metadata() for spec in manifest.outputs],
    }


def _json(document: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    return web.Response(status=status, body=json.dumps(document).encode(), content_type="application/json")


def _error(status: HTTPStatus, message: str) -> web.Response:
    return _json({"error": message}, status)
