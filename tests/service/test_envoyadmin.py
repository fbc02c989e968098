"""Against a real Envoy with a configuration of the test's own, and against sockets that only pretend."""

import asyncio
import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import aiohttp
import pytest

from extproc.envoyadmin import EnvoyAdmin, EnvoyUnreachable, Host
from extproc.envoyfile import envoy_binary

DEADLINE_S = 60.0


@pytest.fixture
def folder():
    """Short enough for a unix socket, which pytest's own folders are not."""
    path = Path(tempfile.mkdtemp(prefix="perch-"))
    yield path
    shutil.rmtree(path)


async def until(condition):
    async with asyncio.timeout(DEADLINE_S):
        while True:
            answer = await condition()
            if answer:
                return answer
            await asyncio.sleep(0.02)


def cluster(name, *paths):
    endpoints = [{"endpoint": {"address": {"pipe": {"path": str(path)}}}} for path in paths]
    check = {"timeout": "600s", "interval": "600s", "unhealthy_threshold": 1, "healthy_threshold": 1}
    return {
        "name": name,
        "type": "STATIC",
        "health_checks": [check | {"http_health_check": {"path": "/ready"}}],
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    }


@contextlib.asynccontextmanager
async def envoy(folder, *clusters, admin_address=None):
    """A real Envoy with these clusters; its admin on a unix socket unless told otherwise."""
    admin_address = admin_address or {"pipe": {"path": str(folder / "admin.sock")}}
    static = {"clusters": list(clusters)}
    config = {"node": {"id": "a", "cluster": "b"}, "admin": {"address": admin_address}, "static_resources": static}
    (folder / "envoy.json").write_text(json.dumps(config))
    options = ("-c", str(folder / "envoy.json"), "--disable-hot-restart", "--concurrency", "1", "--log-level", "error")
    where = ("--admin-address-path", str(folder / "admin.address"))
    process = await asyncio.create_subprocess_exec(envoy_binary(), *options, *where)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def http(path, answer):
    """A server that answers everything with these bytes; None never answers."""
    serving = set()

    async def serve(reader, writer):
        serving.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            if answer is None:
                await reader.read()
            else:
                writer.write(answer)
                await writer.drain()

    server = await asyncio.start_unix_server(serve, path)
    yield
    server.close()
    for task in serving:
        task.cancel()
    await asyncio.gather(*serving, return_exceptions=True)


@pytest.fixture
async def admin(folder):
    reader = EnvoyAdmin(f"unix:{folder / 'admin.sock'}", timeout_s=DEADLINE_S)
    yield reader
    await reader.close()


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
UNREADY = b"HTTP/1.1 503 Unavailable\r\ncontent-length: 0\r\n\r\n"


async def test_only_a_host_that_passed_its_check_is_healthy(folder, admin):
    """Ready, refusing, unready, and one whose first check is still open."""
    paths = {name: folder / f"{name}.sock" for name in ("ready", "refusing", "unready", "silent")}
    one, two = cluster("m_canary", *paths.values()), cluster("m_stable", paths["ready"])
    async with (
        http(paths["ready"], OK),
        http(paths["unready"], UNREADY),
        http(paths["silent"], None),
        envoy(folder, one, two),
    ):
        hosts = await until(lambda: _with_two_healthy(admin))
        verdicts = {Path(host.address).stem: host.healthy for host in hosts if host.cluster == "m_canary"}
        assert verdicts == {"ready": True, "refusing": False, "unready": False, "silent": False}
        (stable,) = [host for host in hosts if host.cluster == "m_stable"]
        assert stable == Host("m_stable", f"unix:{paths['ready']}", healthy=True, model="m", served="stable")


async def _with_two_healthy(admin):
    with contextlib.suppress(EnvoyUnreachable):
        hosts = await admin.hosts()
        return hosts if sum(host.healthy for host in hosts) == 2 else None


@pytest.mark.parametrize(
    "health",
    [
        {"eds_health_status": "UNHEALTHY"},
        {"eds_health_status": "DRAINING"},
        {},
        {"eds_health_status": "HEALTHY", "pending_active_hc": True},
        {"eds_health_status": "HEALTHY", "failed_outlier_check": True},
        {"eds_health_status": "HEALTHY", "pending_dynamic_removal": True},
    ],
)
async def test_any_doubt_about_a_host_is_not_health(folder, admin, health):
    """Flags that a real Envoy shows for moments only, so the answer is given by hand."""
    host = {"address": {"socket_address": {"address": "::1", "port_value": 80}}, "health_status": health}
    body = json.dumps({"cluster_statuses": [{"name": "m_canary", "host_statuses": [host]}]}).encode()
    async with http(folder / "admin.sock", b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body):
        assert await admin.hosts() == (Host("m_canary", "[::1]:80", healthy=False, model="m", served="canary"),)


@pytest.mark.parametrize(
    ("name", "belongs_to"),
    [
        ("digits_stable", ("digits", "stable")),
        ("a_b_canary", ("a_b", "canary")),
        ("digits_canary_stable", ("digits_canary", "stable")),
        ("perch", (None, None)),
        ("perch_als", (None, None)),
        ("_stable", (None, None)),
        ("digits_canary_or_stable", (None, None)),
    ],
)
def test_model_and_arm_come_from_the_clusters_name(name, belongs_to):
    from extproc.envoyadmin import _belongs_to

    assert _belongs_to(name) == belongs_to


async def test_counters_are_read_in_one_call_and_large_answers_whole(folder, admin):
    clusters = [cluster(f"m{n}_stable", folder / "nobody.sock") for n in range(60)]
    async with envoy(folder, *clusters):
        assert await until(lambda: _counters(admin, r"^cluster_manager\.active_clusters$")) == {
            "cluster_manager.active_clusters": 60
        }
        assert await admin.counters("no_such_counter_anywhere") == {}
        everything = await admin.counters(".*")
        assert len([name for name in everything if name.endswith(".upstream_rq_total")]) == 60
        assert 0 <= await admin.age_s() < 100
        content_type, body = await admin.stats("filter=active_clusters&format=prometheus")
        assert content_type.startswith("text/plain")
        assert b"envoy_cluster_manager_active_clusters{} 60" in body
        with pytest.raises(EnvoyUnreachable, match="answers 400 to /stats"):
            await admin.counters("(")


async def _counters(admin, pattern):
    with contextlib.suppress(EnvoyUnreachable):
        return await admin.counters(pattern)


async def test_a_tcp_admin_is_ready_and_then_drains_and_then_is_gone(folder):
    address = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
    async with envoy(folder, cluster("m_stable", folder / "nobody.sock"), admin_address=address) as process:
        written = await until(lambda: _text(folder / "admin.address"))
        admin = EnvoyAdmin(written, timeout_s=DEADLINE_S)
        await until(lambda: _ready(admin))
        assert await admin.listener_port() is None
        assert await admin.filter_version() is None
        async with aiohttp.ClientSession() as client, client.post(f"http://{written}/healthcheck/fail"):
            assert not await admin.ready()
        process.kill()
        await process.wait()
        with pytest.raises(EnvoyUnreachable, match=f"Envoy's admin at {written} cannot be reached: "):
            await admin.ready()
        await admin.close()


async def _text(path):
    return path.read_text() if path.exists() else ""


async def _ready(admin):
    with contextlib.suppress(EnvoyUnreachable):
        return await admin.ready()


async def test_no_envoy_is_one_clear_line_and_the_same_reader_finds_it_later(folder, admin):
    with pytest.raises(EnvoyUnreachable, match=r"admin\.sock cannot be reached: ") as caught:
        await admin.hosts()
    assert "\n" not in str(caught.value)
    async with envoy(folder):
        await until(lambda: _ready(admin))
        assert await admin.hosts() == ()
        await admin.close()
        assert await admin.ready()


NONSENSE = {
    "is no JSON": b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    "is a list": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]",
    "is not HTTP": b"SSH-2.0-OpenSSH_9.9\r\n",
    "has other members": b'HTTP/1.1 200 OK\r\ncontent-length: 45\r\n\r\n{"cluster_statuses": [{"host_statuses": [1]}]}'[
        :-1
    ]
    + b"}",
    "is cut short": b'HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{"cluster_statuses": [',
    "is refused": b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n",
}


@pytest.mark.parametrize("what", NONSENSE)
async def test_nonsense_is_never_taken_for_an_envoy_without_hosts(folder, admin, what):
    async with http(folder / "admin.sock", NONSENSE[what]):
        for call in (admin.hosts(), admin.counters("x"), admin.age_s()):
            with pytest.raises(EnvoyUnreachable) as caught:
                await call
            assert "\n" not in str(caught.value)


async def test_a_silent_admin_costs_its_timeout_and_no_more(folder):
    admin = EnvoyAdmin(f"unix:{folder / 'admin.sock'}", timeout_s=0.05)
    async with http(folder / "admin.sock", None):
        with pytest.raises(EnvoyUnreachable, match=r"did not answer in 0\.05 s"):
            await admin.ready()
        await admin.close()
