"""The HTTP surface: which path answers what. Owns no rule of the protocol and no life cycle.

aiohttp's low-level server is used without its router and middlewares: the paths are few and fixed, and routing them
would take longer than a small model.
"""

import asyncio
import traceback
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

from aiohttp import hdrs, web

from model_servers import jsontext
from model_servers.answers import prediction_list, predictions_of, write_answer
from model_servers.batching import Batcher
from model_servers.errors import ArtifactError, NotWarm, Refused
from model_servers.faults import FaultBox, Injected, read_faults
from model_servers.manifest import read_manifest
from model_servers.model import BadModel
from model_servers.protocol import read_inference
from model_servers.serving import Served, queued
from model_servers.telemetry import Telemetry, rss_bytes
from model_servers.versions import version_directories
from model_servers.written import Written, json_response

SERVER = {
    "name": "perch-model-server",
    "version": "0.1.0",
    "extensions": ["binary_tensor_data", "model_repository(index)", "parameters"],
}
FAULTS_PATH = "/perch/faults"
NOT_WARM = "x-model-not-warm: 1\r\n"
"""On the 503 of a server that is still warming up: Envoy asks another one, the client sees no error."""
_JSON, _RAW = "application/json", "application/octet-stream"
_READ = ("GET", "HEAD")
_JSON_LENGTH = "inference-header-content-length"
_ENVOY_TIMEOUT = "x-envoy-expected-rq-timeout-ms"


@dataclass(frozen=True, slots=True)
class Rules:
    """What stays the same for the life of a server."""

    name: str  # of the model, in the path; may differ from the manifest's
    root: Path
    largest_body: int = 8 << 20  # bytes; JSON is parsed on the loop, and this bounds how long that takes
    deadline_s: float = 15.0
    infer_path: str = field(init=False)  # nearly every request's; known before the path is taken apart

    def __post_init__(self) -> None:
        """Fills in the path."""
        object.__setattr__(self, "infer_path", f"/v2/models/{self.name}/infer")


@dataclass(slots=True)
class State:
    """What the process may do right now; changed by the life cycle, read by every request."""

    rules: Rules
    telemetry: Telemetry
    faults: FaultBox | None = None
    served: Served | None = None
    draining: bool = False

    @property
    def not_ready(self) -> str | None:
        """Why new traffic should not come here; None when it should."""
        if self.draining:
            return "draining"
        return "warming up" if self.served is None else None


async def answer(state: State, request: web.BaseRequest) -> Written:
    """One request to one response: a client's mistake is a 4xx with a sentence, ours a 500 and a line in the log."""
    served = state.served
    try:
        if request.raw_path == state.rules.infer_path and served is not None and request.method == "POST":
            response = await _infer(state, served, request)
        else:
            response = await _route(state, request)
    except Refused as refusal:
        response = _error(refusal.status, str(refusal))
    except NotWarm as refusal:
        response = _error(HTTPStatus.SERVICE_UNAVAILABLE, str(refusal), NOT_WARM)
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception as error:  # noqa: BLE001  whatever went wrong, the client gets one sentence and no traceback
        response = _failure(state, request, error)
    if request.raw_path.endswith("/infer"):
        state.telemetry.answered("none" if served is None else served.model.manifest.version, response.status)
    if state.draining:
        response.force_close()
    return response


async def _route(state: State, request: web.BaseRequest) -> Written:
    path = request.path.rstrip("/")
    rules = state.rules
    rest = path.removeprefix("/v2/models/")
    if rest != path:
        return await _route_model(state, request, rest.split("/"))
    match path:
        case "/v2/health/live":
            _require_method(request, *_READ)
            return json_response({"live": True})
        case "/v2/health/ready":
            _require_method(request, *_READ)
            return _readiness(state, {})
        case "/v2":
            _require_method(request, *_READ)
            return json_response(SERVER)
        case "/v2/repository/index":
            _require_method(request, "POST")
            return json_response(_index(state))
        case _ if path == FAULTS_PATH and state.faults is not None:
            return await _faults(state, request, state.faults)
    raise Refused(f"no such path: {path or '/'}; the model is at /v2/models/{rules.name}", HTTPStatus.NOT_FOUND)


async def _route_model(state: State, request: web.BaseRequest, parts: list[str]) -> Written:
    """/v2/models/NAME[/versions/VERSION][/ready|/infer], split behind /v2/models/."""
    name, *rest = parts
    if name != state.rules.name:
        raise Refused(f"unknown model {name!r}; this server has {state.rules.name!r}", HTTPStatus.NOT_FOUND)
    served = state.served
    if rest[:1] == ["versions"] and len(rest) > 1:
        _require_version(served, rest[1])
        rest = rest[2:]
    match rest:
        case ["infer"]:
            _require_method(request, "POST")
            return await _infer(state, _require_served(served), request)
        case ["ready"]:
            _require_method(request, *_READ)
            return _readiness(state, {"name": name})
        case []:
            _require_method(request, *_READ)
            return json_response(_metadata(state.rules, _require_served(served)))
    raise Refused(f"no such path below the model {name!r}: {'/'.join(rest)}", HTTPStatus.NOT_FOUND)


async def _infer(state: State, served: Served, request: web.BaseRequest) -> Written:
    manifest = served.model.manifest
    arrived_s = asyncio.get_running_loop().time()
    json_bytes = _require_readable(request)
    content = request.content
    if content.is_eof() and content.total_bytes <= state.rules.largest_body:
        body = content.read_nowait()
    else:
        body = await _read_body(request, served.batcher, state.rules.largest_body)
    inference = read_inference(body, json_bytes, manifest)
    if state.faults is not None:
        await state.faults.before()
    deadline_s = arrived_s + _timeout_s(request, inference.timeout_s, state.rules.deadline_s)
    outputs = await served.batcher.infer(queued(served.model, inference, deadline_s))
    if state.faults is not None:
        outputs = state.faults.after(outputs, manifest)
    text, json_part = write_answer(inference, outputs, manifest)
    predictions = predictions_of(outputs, manifest)
    state.telemetry.predicted(manifest.version, predictions)
    kind = _JSON if json_part is None else f"{_RAW}\r\ninference-header-content-length: {json_part}"
    headers = (
        f"content-type: {kind}\r\nx-model-version: {manifest.version}\r\n"
        f"x-model-prediction: {prediction_list(predictions)}\r\nx-model-prediction-count: {len(predictions)}\r\n"
    )
    return Written(200, text, headers)


def _require_readable(request: web.BaseRequest) -> int | None:
    """How many bytes of the body are JSON (None: all). Raises Refused for a body of another kind."""
    headers = request.headers
    content_type = headers.get(hdrs.CONTENT_TYPE, _JSON)
    if content_type not in {_JSON, _RAW} and content_type.partition(";")[0].strip().lower() not in {_JSON, _RAW}:
        raise Refused(
            f"content type {content_type!r}; send {_JSON}, or {_RAW} with binary tensors",
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        )
    given = headers.get(_JSON_LENGTH)
    if given is None:
        return None
    if not given.isascii() or not given.isdigit() or len(given) > 12:
        raise Refused(f"inference-header-content-length is {given[:40]!r}; it must be a number of bytes")
    return int(given)


async def _read_body(request: web.BaseRequest, batcher: Batcher, largest: int) -> bytes:
    """The body; waits for the rest of it if it must. Raises Refused (413) as soon as it is known to be too large."""
    content = request.content
    if (request.content_length or 0) > largest:
        _refuse_large(largest)
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        # Curl waits for this above 1 MB; aiohttp's low-level server leaves it to us.
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    parts: list[bytes] = []
    size = 0
    with batcher.arriving():
        while part := await content.readany():
            size += len(part)
            if size > largest:
                _refuse_large(largest)
            parts.append(part)
    return b"".join(parts)


def _refuse_large(largest: int) -> NoReturn:
    raise Refused(f"the body is larger than {largest} bytes", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


def _timeout_s(request: web.BaseRequest, asked_s: float | None, longest_s: float) -> float:
    """How long this request may take: what its client asks for and what Envoy says is left, at most `longest_s`."""
    timeout_s = longest_s if asked_s is None else min(asked_s, longest_s)
    given = request.headers.get(_ENVOY_TIMEOUT)
    if given is not None and given.isascii() and given.isdigit() and len(given) < 10:
        timeout_s = min(timeout_s, int(given) / 1000)
    return timeout_s


def _readiness(state: State, document: dict[str, Any]) -> Written:
    reason = state.not_ready
    if reason is None:
        return json_response({**document, "ready": True})
    return json_response({**document, "ready": False, "reason": reason}, HTTPStatus.SERVICE_UNAVAILABLE)


def _metadata(rules: Rules, served: Served) -> dict[str, Any]:
    manifest = served.model.manifest
    return {
        "name": rules.name,
        "versions": [manifest.version],
        "platform": f"perch_{manifest.backend}",
        "inputs": [spec.metadata() for spec in manifest.inputs],
        "outputs": [spec.metadata() for spec in manifest.outputs],
    }


def _index(state: State) -> list[dict[str, str]]:
    """Every version directory: the one in service is READY, the others are there but not loaded."""
    current = state.served.model.manifest.version if state.served is not None else None
    entries = []
    try:
        directories = version_directories(state.rules.root)
    except ArtifactError:
        directories = []
    for directory in directories:
        try:
            version, reason = read_manifest(directory).version, ""
        except ArtifactError as error:
            version, reason = directory.name, str(error)
        ready = version == current and state.not_ready is None
        entry = {"name": state.rules.name, "version": version, "state": "READY" if ready else "UNAVAILABLE"}
        entries.append({**entry, "reason": "" if ready else reason or "not loaded"})
    return entries


async def _faults(state: State, request: web.BaseRequest, box: FaultBox) -> Written:
    """Shows the fault set, or replaces it; only for callers on this machine that did not come through a proxy."""
    _require_method(request, *_READ, "PUT")
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    local = not isinstance(peer, tuple) or peer[0] in {"127.0.0.1", "::1"}
    if not local or any(name in request.headers for name in ("x-request-id", "x-forwarded-for", "via")):
        raise Refused("faults can only be set from this machine, not through a proxy", HTTPStatus.FORBIDDEN)
    if request.method == "PUT":
        try:
            document = jsontext.read(await request.read())
        except ValueError as error:
            raise Refused(f"the body is not JSON: {error}") from None
        state.faults = box = FaultBox(read_faults(document))
    return json_response({"faults": {name: getattr(box.faults, name) for name in box.faults.__slots__}})


def _require_method(request: web.BaseRequest, *methods: str) -> None:
    if request.method not in methods:
        raise Refused(f"{request.method} is not allowed here; use {methods[0]}", HTTPStatus.METHOD_NOT_ALLOWED)


def _require_served(served: Served | None) -> Served:
    if served is None:
        raise NotWarm("the model is warming up; try again in a second")
    return served


def _require_version(served: Served | None, version: str) -> None:
    current = _require_served(served).model.manifest.version
    if version != current:
        raise Refused(f"version {version!r} is not served; {current!r} is", HTTPStatus.NOT_FOUND)


def _failure(state: State, request: web.BaseRequest, error: Exception) -> Written:
    if isinstance(error, Injected):
        return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "a fault was injected")
    event = "bad_output" if isinstance(error, BadModel) else "inference_failed"
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    state.telemetry.failed(
        event,
        model=state.rules.name,
        version=state.served.model.manifest.version if state.served is not None else None,
        request_id=request.headers.get("x-request-id"),
        error=repr(error),
        where=f"{frame[0].filename}:{frame[0].lineno}" if frame else None,
        rss_bytes=rss_bytes(),
    )
    return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "the model failed on this request; the server's log says why")


def _error(status: HTTPStatus, message: str, headers: str = "") -> Written:
    retry = "retry-after: 1\r\n" if status is HTTPStatus.SERVICE_UNAVAILABLE else ""
    return json_response({"error": message}, status, retry + headers)
