"""The reference transport: ext_proc and the health service on grpc.aio, raw bytes in and out, on one loop."""

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc

from extproc.transport.listen import is_abandoned

Answer = Callable[[bytes], bytes]

PROCESS = "envoy.service.ext_proc.v3.ExternalProcessor"
HEALTH = "grpc.health.v1.Health"
SERVICES = ("", PROCESS, "perch")
"""The names whose health may be asked for: the server as a whole, and what it serves."""

WATCH_EVERY_S = 0.2
_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"
"""HealthCheckResponse{status}: one enum field each. Source: grpc/health/v1/health.proto."""


class GrpcioTransport:
    """Serves `answer` at an address. Health is answered by the loop that answers, so a hung loop is unhealthy."""

    def __init__(self, answer: Answer, serving: Callable[[], bool]) -> None:
        self._answer = answer
        self._serving = serving
        self._server: Any = None
        self._socket: Path | None = None
        self._born: tuple[int, int] | None = None
        self._draining = False

    async def start(self, listen: str) -> str:
        """Listens at `unix:/path` (owner only) or `HOST:PORT` (0 for any port); returns the address that it got.

        Raises OSError, with the address in its message, when it is taken or cannot be used.
        """
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 1 << 20)]
        self._server = grpc.aio.server(options=options)
        self._server.add_generic_rpc_handlers((self._process_service(), self._health_service()))
        if listen.startswith("unix:"):
            self._socket = Path(listen.removeprefix("unix:"))
            self._socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            free_socket(self._socket)
        before = os.umask(0o077)
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError:
            raise OSError(f"cannot listen at {listen}: the address is taken or not ours") from None
        finally:
            os.umask(before)
        await self._server.start()
        self._born = birth_of(self._socket)
        return listen if self._socket is not None else f"{listen.rpartition(':')[0]}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Takes no more streams, lets those under way end within `grace_s` seconds, removes the socket."""
        self._draining = True
        if self._server is not None:
            await self._server.stop(grace_s)
        # gRPC has removed the socket already, when it began to drain; what is there now may be our successor's.
        if self._socket is not None and self._born is not None and birth_of(self._socket) == self._born:
            with contextlib.suppress(FileNotFoundError):
                self._socket.unlink()

    def _process_service(self) -> Any:
        async def process(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
            async for message in requests:
                yield self._answer(message)

        return grpc.method_handlers_generic_handler(
            PROCESS, {"Process": grpc.stream_stream_rpc_method_handler(process)}
        )

    def _health_service(self) -> Any:
        async def check(request: bytes, context: Any) -> bytes:
            if health_service_of(request) not in SERVICES:
                await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
            return self._status()

        async def watch(request: bytes, _context: Any) -> AsyncIterator[bytes]:
            known = health_service_of(request) in SERVICES
            told = b""
            while not self._draining:
                status = self._status() if known else _SERVICE_UNKNOWN
                if status != told:
                    yield status
                    told = status
                await asyncio.sleep(WATCH_EVERY_S)

        handlers = {
            "Check": grpc.unary_unary_rpc_method_handler(check),
            "Watch": grpc.unary_stream_rpc_method_handler(watch),
        }
        return grpc.method_handlers_generic_handler(HEALTH, handlers)

    def _status(self) -> bytes:
        return _SERVING if self._serving() and not self._draining else _NOT_SERVING


def health_service_of(request: bytes) -> str | None:
    """The `service` of a serialized HealthCheckRequest: field 1, a short string. None for anything else."""
    if not request:
        return ""
    if len(request) >= 2 and request[0] == 0x0A and request[1] == len(request) - 2 < 0x80:
        return request[2:].decode(errors="replace")
    return None


def birth_of(path: Path | None) -> tuple[int, int] | None:
    """What tells a file from a later one at the same place: inode and its time, since inodes are used again."""
    try:
        status = path.lstat() if path is not None else None
    except FileNotFoundError:
        return None
    return (status.st_ino, status.st_ctime_ns) if status is not None else None


def free_socket(path: Path) -> None:
    """Removes a socket file that nobody listens at any more. Raises OSError if somebody does, or it is no socket."""
    try:  # one look: who listened there may remove it meanwhile
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):  # connecting to one would be refused just as a stale socket does
        raise OSError(f"cannot listen at {path}: a file that is no socket is there; choose another path")
    try:
        abandoned = is_abandoned(path)
    except OSError as error:
        raise OSError(f"cannot listen at {path}: {error.strerror}") from None
    if not abandoned:
        raise OSError(f"cannot listen at {path}: another process does; stop it or choose another path")
    path.unlink(missing_ok=True)
