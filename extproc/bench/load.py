"""The load, by wrk or h2load as people have them: as fast as Envoy answers, and at a fixed rate."""

import asyncio
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from extproc.bench.samples import RATE_PER_S

CONNECTIONS = 32
USERS = 1_000
HEADERS = ("x-session-id: s-1", "x-tenant: umbrella", "x-region: us-east", "accept: */*")
MISSING = "bench needs wrk or h2load on PATH (Debian, Ubuntu: apt-get install wrk nghttp2-client)"
NO_LATENCY = "no latencies: they need h2load on PATH (Debian, Ubuntu: apt-get install nghttp2-client)"

# Each request another user, from a list made beforehand, so that the load costs little of what is measured.
_WRK_SCRIPT = f"""\
local requests, turn = {{}}, 0
init = function(args)
  for i = 1, {USERS} do
    wrk.headers["x-user-id"] = "user-" .. i
    requests[i] = wrk.format("GET")
  end
end
request = function()
  turn = turn % {USERS} + 1
  return requests[turn]
end
"""


class BenchError(Exception):
    """The bench cannot go on, or its figures would mean nothing. One line."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """What was answered in one go."""

    requests: int
    per_s: float


@dataclass(frozen=True, slots=True)
class Tools:
    """Which of the two there are, as paths."""

    wrk: str | None
    h2load: str | None

    @property
    def name(self) -> str:
        """Of the one that drives the throughput."""
        return "wrk" if self.wrk else "h2load"


def find_tools() -> Tools:
    """What is on PATH. Raises BenchError when it is neither."""
    tools = Tools(shutil.which("wrk"), shutil.which("h2load"))
    if tools.wrk is None and tools.h2load is None:
        raise BenchError(MISSING)
    return tools


async def throughput(tools: Tools, url: str, seconds: int, folder: Path, within_s: int = 2) -> Throughput:
    """As many requests as CONNECTIONS connections get answered in so many seconds. Raises BenchError if one failed.

    With wrk, one that was not answered within `within_s` seconds has failed.
    """
    if tools.wrk is not None:
        script = folder / "users.lua"
        script.write_text(_WRK_SCRIPT, encoding="ascii")
        limits = ("-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", f"--timeout={within_s}s")
        said = await _said(tools.wrk, *limits, "-s", str(script), *_headers(), url)
        if "Non-2xx" in said or "Socket errors" in said:
            raise BenchError(f"requests failed: {_line_with('Non-2xx|Socket errors', said)}")
        return Throughput(int(_found(r"(\d+) requests in", said)), float(_found(r"Requests/sec:\s+([\d.]+)", said)))
    said = await _said(*_h2load(tools, seconds), f"-c{CONNECTIONS}", *_headers("user-1"), url)
    _require_success(said)
    return Throughput(int(_found(r"(\d+) succeeded", said)), float(_found(r"finished in [^,]+, ([\d.]+) req/s", said)))


async def latencies_us(tools: Tools, url: str, seconds: int, folder: Path) -> tuple[float, float] | None:
    """Median and 99th percentile at RATE_PER_S over ten connections; None without h2load, which alone can do that."""
    if tools.h2load is None:
        return None
    log = folder / "h2load.log"
    log.unlink(missing_ok=True)
    rate = ("--h1", "-t1", f"-n{RATE_PER_S * seconds}", "-c10", f"--rps={RATE_PER_S // 10}")
    # The connections begin a millisecond after one another: at once, each request would wait for up to nine others.
    apart = ("-r1", "--rate-period=1ms")
    _require_success(await _said(tools.h2load, *rate, *apart, f"--log-file={log}", *_headers("user-1"), url))
    times = sorted(int(line.split("\t")[2]) for line in log.read_text(encoding="ascii").splitlines())
    if not times:
        raise BenchError("h2load logged no request")
    return percentile(times, 50), percentile(times, 99)


def percentile(ordered: Sequence[int], percent: int) -> float:
    """The nearest-rank percentile of values in ascending order."""
    return float(ordered[max(0, -(-len(ordered) * percent // 100) - 1)])


def _h2load(tools: Tools, seconds: int) -> tuple[str, ...]:
    return (str(tools.h2load), "--h1", "-t1", f"-D{seconds}")


def _headers(user: str | None = None) -> list[str]:
    headers = HEADERS if user is None else (f"x-user-id: {user}", *HEADERS)
    return [part for header in headers for part in ("-H", header)]


def _require_success(said: str) -> None:
    if int(_found(r"(\d+) failed", said)) or int(_found(r"(\d+) errored", said)):
        raise BenchError(f"requests failed: {_line_with('failed', said)}")


async def _said(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        said = (await process.communicate())[0].decode(errors="replace")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise BenchError(f"{Path(command[0]).name} ended with {process.returncode}: {said.strip()[-200:]}")
    return said


def _found(pattern: str, said: str) -> str:
    match = re.search(pattern, said)
    if match is None:
        raise BenchError(f"the load generator said nothing like {pattern!r}: {said.strip()[-200:]}")
    return match[1]


def _line_with(pattern: str, said: str) -> str:
    return next((line.strip() for line in said.splitlines() if re.search(pattern, line)), said.strip()[-200:])
