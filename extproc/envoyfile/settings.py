"""What perch needs to know to render Envoy's configuration, and the one error all of it raises."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

DEFAULT_FORWARDED = (":path", "x-user-id", "x-session-id", "x-force-cohort")
"""What perch gets to see of a request when no flag reads more: the path, the default units, the token."""
REQUEST_ID = "x-request-id"


class EnvoyFileError(Exception):
    """The configuration cannot be rendered, or Envoy refuses it. One line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvoySettings:
    """Where Envoy listens, whom it asks, where it logs. Addresses: `HOST:PORT`, `[IPv6]:PORT`, `unix:PATH`.

    `run_dir` is what relative paths are joined to; the rendered files live in `files_dir` (default `run_dir/envoy`).
    `ext_proc` has one address per perch worker. `statsd` needs an IP address, or None for no sink. `canary_log` is the
    file that gets one JSON line per request assigned to canary. `logged_headers` are request headers that the gRPC
    access log carries besides `x-model-cohort`. `concurrency` is Envoy's number of worker threads.
    """

    run_dir: Path
    ext_proc: tuple[str, ...]
    access_log: str
    listen: str = "127.0.0.1:10000"
    admin: str = "127.0.0.1:9901"
    files_dir: Path | None = None
    statsd: str | None = None
    force_token: bool = False
    canary_log: Path | None = None
    logged_headers: tuple[str, ...] = ()
    show_cohort: bool = True
    show_version: bool = True
    concurrency: int = 1
    node_id: str = "perch-edge"
    node_cluster: str = "perch"

    @property
    def files(self) -> Path:
        """Absolute folder of the rendered files, the one Envoy watches."""
        return (self.files_dir or self.run_dir / "envoy").absolute()


def forwarded_headers(names: Iterable[str] = ()) -> tuple[str, ...]:
    """The headers Envoy shows to perch: the default ones and `names`, lower-case, sorted, each once.

    A name is a header or a unit as flags write it: `cookie:NAME` needs the cookie header, `random` the request id.
    """
    wanted = set(DEFAULT_FORWARDED)
    for name in names:
        lower = name.strip().lower()
        if lower.startswith("cookie:"):
            wanted.add("cookie")
        elif lower:
            wanted.add(REQUEST_ID if lower == "random" else lower)
    return tuple(sorted(wanted))
