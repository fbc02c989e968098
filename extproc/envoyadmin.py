"""Reads Envoy's admin interface: which hosts are healthy, what the counters say, which configuration was taken.

Reads only. Every failure is an EnvoyUnreachable with one line; a silent Envoy is never taken for a healthy one.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp

from extproc.address import TcpAddress, UnixAddress, parse_address

_NOT_HEALTHY = ("failed_active_health_check", "pending_active_hc", "failed_outlier_check", "pending_dynamic_removal")


class EnvoyUnreachable(Exception):  # noqa: N818  it is a state of the world before it is an error
    """Envoy's admin interface cannot be reached or answers nonsense. One line."""


@dataclass(frozen=True, slots=True)
class Host:
    """One endpoint as Envoy sees it. `healthy` only after a passed health check: a host not yet checked is not healthy.

    `address` is `unix:PATH`, `IP:PORT` or `[IPv6]:PORT`. `model` and `served` (stable or canary) are None for clusters
    that belong to no model.
    """

    cluster: str
    address: str
    healthy: bool
    model: str | None
    served: str | None


class EnvoyAdmin:
    """A client of one Envoy's admin interface at `HOST:PORT` or `unix:/PATH`; a call may take `timeout_s` seconds."""

    def __init__(self, address: str, timeout_s: float = 2.0) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def hosts(self) -> tuple[Host, ...]:
        """Every host of every cluster, in Envoy's order."""
        answer = await self._json("/clusters?format=json")
        try:
            return tuple(
                _host(cluster["name"], host)
                for cluster in answer.get("cluster_statuses", ())
                for host in cluster.get("host_statuses", ())
            )
        except (AttributeError, KeyError, TypeError) as problem:
            raise EnvoyUnreachable(f"Envoy's admin at {self._address} lists hosts without {problem}") from None

    async def counters(self, pattern: str) -> dict[str, int]:
        """Counters and gauges whose name matches the regular expression `pattern` (RE2, found anywhere in the name)."""
        answer = await self._json(f"/stats?format=json&filter={quote(pattern, safe='')}")
        try:
            stats = answer["stats"]
            return {one["name"]: int(one["value"]) for one in stats if isinstance(one.get("value"), int)}
        except (AttributeError, KeyError, TypeError) as problem:
            raise EnvoyUnreachable(f"Envoy's admin at {self._address} answers stats without {problem}") from None

    async def age_s(self) -> int:
        """Whole seconds since Envoy began."""
        answer = await self._json("/server_info")
        try:
            return int(answer["uptime_current_epoch"].removesuffix("s"))
        except (AttributeError, KeyError, ValueError) as problem:
            raise EnvoyUnreachable(f"Envoy's admin at {self._address} tells its age without {problem}") from None

    async def stats(self, query: str) -> tuple[str, bytes]:
        """Envoy's answer to `/stats?query` as it stands, content type and body, for those who may only read stats."""
        _, content_type, body = await self._get(f"/stats?{query}")
        return content_type, body

    async def ready(self) -> bool:
        """True once Envoy has its first configuration and is not draining; raises EnvoyUnreachable if it is gone."""
        status, _, _ = await self._get("/ready")
        return status == 200

    async def listener_port(self, name: str = "edge") -> int | None:
        """The TCP port the listener really has (settings may say 0); None while it does not listen or on a socket."""
        answer = await self._json("/listeners?format=json")
        for listener in answer.get("listener_statuses", ()):
            if listener.get("name") == name:
                port = listener.get("local_address", {}).get("socket_address", {}).get("port_value")
                return int(port) if port is not None else None
        return None

    async def filter_version(self) -> str | None:
        """`version_info` of the ext_proc filter in force; compare with `version_of(render_filter(...))`."""
        status, _, body = await self._get("/config_dump?resource=ecds_filters")
        if status == 404:  # Envoy's way to say that it has none yet
            return None
        found = [one.get("version_info") for one in self._parsed(status, body, "/config_dump").get("configs", ())]
        return found[0] if found else None

    async def close(self) -> None:
        """Closes the connections; the next call opens them again."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _json(self, path: str) -> Mapping[str, Any]:
        status, _, body = await self._get(path)
        return self._parsed(status, body, path.partition("?")[0])

    def _parsed(self, status: int, body: bytes, path: str) -> Mapping[str, Any]:
        if status != 200:
            raise EnvoyUnreachable(f"Envoy's admin at {self._address} answers {status} to {path}")
        try:
            answer = json.loads(body)
        except ValueError:
            raise EnvoyUnreachable(f"Envoy's admin at {self._address} does not answer JSON; is it Envoy?") from None
        if not isinstance(answer, dict):
            raise EnvoyUnreachable(f"Envoy's admin at {self._address} does not answer an object; is it Envoy?")
        return answer

    async def _get(self, path: str) -> tuple[int, str, bytes]:
        """Status, content type and whole body."""
        session, origin = self._open()
        try:
            async with asyncio.timeout(self._timeout_s), session.get(origin + path) as answer:
                return answer.status, answer.headers.get("content-type", "text/plain"), await answer.read()
        except TimeoutError:
            raise EnvoyUnreachable(
                f"Envoy's admin at {self._address} did not answer in {self._timeout_s:g} s"
            ) from None
        except (aiohttp.ClientError, OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", None) or problem
            raise EnvoyUnreachable(f"Envoy's admin at {self._address} cannot be reached: {reason}") from None

    def _open(self) -> tuple[aiohttp.ClientSession, str]:
        """The session, opened with the first call because it belongs to the running loop, and the URL's origin."""
        address = parse_address(self._address)
        match address:
            case UnixAddress(path):
                origin = "http://envoy"
                if self._session is None:
                    self._session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path)))
            case TcpAddress(host, port):
                origin = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
                if self._session is None:
                    self._session = aiohttp.ClientSession()
        return self._session, origin


def _host(cluster: str, status: Mapping[str, Any]) -> Host:
    health = status.get("health_status", {})
    healthy = health.get("eds_health_status") == "HEALTHY" and not any(health.get(flag) for flag in _NOT_HEALTHY)
    model, served = _belongs_to(cluster)
    return Host(cluster, _address(status["address"]), healthy, model, served)


def _address(address: Mapping[str, Any]) -> str:
    if "pipe" in address:
        return f"unix:{address['pipe']['path']}"
    host, port = address["socket_address"]["address"], address["socket_address"]["port_value"]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _belongs_to(cluster: str) -> tuple[str, str] | tuple[None, None]:
    """Model and arm from the names that perch renders; the composite has no hosts of its own."""
    model, _, arm = cluster.rpartition("_")
    if model and arm in {"stable", "canary"} and not cluster.endswith("_canary_or_stable"):
        return model, arm
    return None, None
