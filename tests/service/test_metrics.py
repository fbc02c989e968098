import asyncio
import contextlib
import re
import select
import socket
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from extproc import datagrams
from extproc.metrics import Dialect, Metrics

# The dialects as their servers read them, written down apart from the code that writes them.
VALUE = r":(?P<value>-?\d+(?:\.\d+)?)\|(?P<kind>c|g|ms)(?:\|@(?P<rate>0\.\d*[1-9]\d*))?"
NAME = r"(?P<name>[A-Za-z0-9_\-]+(?:\.[A-Za-z0-9_\-]+)*)"
GRAMMAR = {
    Dialect.DOGSTATSD: NAME + VALUE + r"(?:\|#(?P<tags>[A-Za-z0-9_\-]+:[^,|#\s]+(?:,[A-Za-z0-9_\-]+:[^,|#\s]+)*))?",
    Dialect.INFLUX: NAME + r"(?P<tags>(?:,[A-Za-z0-9_\-]+=[^,=:|;\s]+)*)" + VALUE,
    Dialect.GRAPHITE: NAME + r"(?P<tags>(?:;[A-Za-z0-9_\-]+=[^;:|~\s]+)*)" + VALUE,
    Dialect.NONE: NAME + r"(?P<tags>)" + VALUE,
}
TEXT = st.text(st.characters() | st.sampled_from(list("|#:,;=~@.\n\r\t \x00/\\\"'-ü")), max_size=30)
TAG_KEYS = TEXT.filter(lambda key: key not in {"self", "name", "n", "value", "ms"})


class Server:
    """A StatsD server: a real datagram socket and the dialect's grammar."""

    def __init__(self, dialect, family=socket.AF_INET, address=("127.0.0.1", 0)):
        self.grammar = re.compile(GRAMMAR[dialect], re.ASCII)
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.socket.bind(address)
        self.family = family
        self.port = self.socket.getsockname()[1] if family != socket.AF_UNIX else 0
        self.address = f"127.0.0.1:{self.port}"

    def packets(self):
        """Everything that was sent: a busy kernel hands packets over after `send` has returned, but in their order.

        So behind them comes one of our own, which is empty. On a unix socket they are there at once.
        """
        found = []
        if self.family == socket.AF_UNIX:
            self.socket.setblocking(False)
        else:
            self.socket.settimeout(30)
            self.socket.sendto(b"", ("127.0.0.1", self.port))
        with contextlib.suppress(BlockingIOError):
            while packet := self.socket.recv(65536):
                found.append(packet)
        return found

    def lines(self):
        """(name, kind, value, rate, tags) of every line that has arrived."""
        parsed = []
        for packet in self.packets():
            assert 0 < len(packet) < 1432
            for line in packet.decode("ascii").split("\n"):
                match = self.grammar.fullmatch(line)
                assert match, f"not a line of this dialect: {line!r}"
                tags = sorted(re.split("[,;]", match["tags"].lstrip(",;"))) if match["tags"] else []
                parsed.append((match["name"], match["kind"], match["value"], match["rate"], tags))
        return parsed

    async def next_lines(self):
        """What `lines` says once something has arrived."""
        async with asyncio.timeout(30):
            readable = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(self.socket, readable.set)
            await readable.wait()
            loop.remove_reader(self.socket)
        return self.lines()


@pytest.fixture
def serve():
    made = []

    def start(*args, **kwargs):
        made.append(Server(*args, **kwargs))
        return made[-1]

    yield start
    for server in made:
        server.socket.close()


@pytest.fixture
def measure():
    made = []

    def start(*args, **kwargs):
        made.append(Metrics(*args, **kwargs))
        return made[-1]

    yield start
    for metrics in made:
        metrics.close()


def dropped(lines):
    """Sums of `perch.metrics.dropped` by cause."""
    sums = {}
    for name, _, value, _, tags in lines:
        if name == "perch.metrics.dropped":
            cause = next(tag for tag in tags if tag.startswith("why")).partition(":")[2]
            sums[cause] = sums.get(cause, 0) + int(value)
    return sums


@pytest.mark.parametrize(
    ("dialect", "line"),
    [
        (Dialect.DOGSTATSD, "perch.decision.count:3|c|#cohort:canary,flag:digits"),
        (Dialect.INFLUX, "perch.decision.count,cohort=canary,flag=digits:3|c"),
        (Dialect.GRAPHITE, "perch.decision.count;cohort=canary;flag=digits:3|c"),
        (Dialect.NONE, "perch.decision.count.canary.digits:3|c"),
    ],
)
def test_each_dialect_writes_sorted_tags_where_its_server_looks_for_them(serve, measure, dialect, line):
    server = serve(dialect)
    metrics = measure(server.address, dialect, tags={"cohort": "overridden"})
    metrics.count("decision.count", 2, flag="digits", cohort="canary")
    metrics.count("decision.count", cohort="canary", flag="digits")
    metrics.flush()
    assert server.packets() == [line.encode()]


@pytest.mark.parametrize("dialect", list(Dialect))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(name=TEXT, tags=st.dictionaries(TAG_KEYS, TEXT, max_size=4), number=st.floats() | st.integers())
def test_whatever_names_tags_and_values_hold_every_line_parses(serve, measure, dialect, name, tags, number):
    server = serve(dialect)
    metrics = measure(server.address, dialect, tags={"name": name, "": "\n"})
    metrics.count(name, number, **tags)
    metrics.gauge(name, number, **tags)
    metrics.timing(name, number, **tags)
    metrics.flush()
    assert all(got.startswith("perch") for got, *_ in server.lines())
    server.socket.close()
    metrics.close()


def test_a_tag_value_cannot_forge_a_line_or_a_tag(serve, measure):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    metrics.count("a", flag="x,admin:yes|c\nperch.b:9|c|#y")
    metrics.flush()
    assert server.lines() == [("perch.a", "c", "1", None, ["flag:x_admin:yes_c_perch.b:9_c__y"])]


def test_a_sum_of_zero_is_not_sent_and_a_gauge_only_when_set_again(serve, measure):
    server = serve(Dialect.NONE)
    metrics = measure(server.address, Dialect.NONE)
    metrics.count("zero", 0)
    metrics.count("gone", 2)
    metrics.count("gone", -2)
    metrics.gauge("percent", 5)
    metrics.gauge("percent", 25.125)
    metrics.flush()
    assert server.lines() == [("perch.percent", "g", "25.125", None, [])]
    metrics.flush()
    assert server.lines() == []


@pytest.mark.parametrize("dialect", list(Dialect))
def test_a_negative_gauge_starts_from_zero_in_the_same_packet(serve, measure, dialect):
    server = serve(dialect)
    metrics = measure(server.address, dialect)
    for n in range(100):  # enough for several packets, so that a pair could be torn
        metrics.gauge(f"delta{n}", -1.5, flag="digits")
    metrics.flush()
    packets = [packet.decode().split("\n") for packet in server.packets()]
    assert len(packets) > 1
    for lines in packets:
        values = [re.search(r":(.+?)\|g", line)[1] for line in lines]
        assert values == ["0", "-1.5"] * (len(lines) // 2)


def test_numbers_are_written_without_exponent_and_what_is_no_number_is_counted(serve, measure):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    metrics.gauge("tiny", 1e-7)
    metrics.gauge("nothing", -1e-12)
    metrics.gauge("large", 1e17)
    for bad in (float("nan"), float("inf"), -float("inf"), 1e18, 10**5000, "five", None):
        metrics.gauge("bad", bad)
        metrics.timing("bad", bad)
        metrics.count("bad", bad)
    metrics.timing("bad", -1)
    metrics.count("good", 1)
    metrics.count("good", "x")
    metrics.count("good", 1)
    metrics.flush()
    lines = server.lines()
    assert {name: value for name, _, value, *_ in lines if name != "perch.metrics.dropped"} == {
        "perch.tiny": "0.0000001",
        "perch.nothing": "0",
        "perch.large": "100000000000000000",
        "perch.good": "2",
    }
    assert dropped(lines) == {"value": 7 * 3 + 2}


def test_names_and_tags_that_are_no_text_are_counted_not_raised(serve, measure):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    for bad in (None, 5, [], {}, b"bytes"):
        metrics.count("a", tag=bad)
        metrics.gauge("a", 1, tag=bad)
        metrics.timing("a", 1, tag=bad)
        metrics.count(bad)
    metrics.flush()
    assert dropped(server.lines()) == {"value": 20}


def test_timings_beyond_the_reservoir_carry_the_rate_they_were_sampled_at(serve, measure):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    for ms in range(256):
        metrics.timing("latency", ms, cohort="canary")
    metrics.timing("latency", 7.25, cohort="stable")
    metrics.flush()
    lines = server.lines()
    canary = [(value, rate) for *_, value, rate, tags in lines if tags == ["cohort:canary"]]
    assert [rate for _, rate in canary] == ["0.25"] * 64
    assert len({value for value, _ in canary}) == 64
    assert any(float(value) >= 64 for value, _ in canary)  # not just the first ones; all 64 early: 1 in 10^60
    assert [(value, rate) for *_, value, rate, tags in lines if tags == ["cohort:stable"]] == [("7.25", None)]


def timing_lines(server):
    """[(value, rate)] of everything that has arrived."""
    return [(float(value), rate and float(rate)) for _, kind, value, rate, _ in server.lines() if kind == "ms"]


def test_a_sample_of_durations_is_sent_with_the_rate_of_what_it_stands_for(serve, measure):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    metrics.timings("latency", [3.5, 1, 2], 3, cohort="canary")
    metrics.flush()
    assert timing_lines(server) == [(3.5, None), (1, None), (2, None)]
    metrics.timings("latency", range(64), 6_400)
    metrics.flush()
    assert timing_lines(server) == [(ms, 0.01) for ms in range(64)]


@pytest.mark.parametrize(
    ("batches", "sent"),
    [
        ([(10, 10), (20, 20)], {1: 10, 2: 20}),
        ([(64, 900), (64, 100)], {1: 58, 2: 6}),
        ([(64, 100), (64, 900)], {1: 6, 2: 58}),
        ([(60, 60), (10, 10)], {1: 55, 2: 9}),
        ([(64, 1_000_000), (5, 5)], {1: 64}),
        ([(200, 200)], {1: 64}),
    ],
)
def test_samples_that_come_between_two_flushes_add_up_and_each_keeps_its_share(serve, measure, batches, sent):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    for ms, (n, seen) in enumerate(batches, 1):
        metrics.timings("latency", [ms] * n, seen)
    metrics.flush()
    lines = timing_lines(server)
    assert {ms: sum(value == ms for value, _ in lines) for ms in sent} == sent
    assert len(lines) == sum(sent.values())
    stand_for = sum(1 / (rate or 1) for _, rate in lines)
    assert stand_for == pytest.approx(sum(seen for _, seen in batches))


def test_durations_that_are_none_are_left_out_of_a_sample_and_counted(serve, measure):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    metrics.timings("latency", [float("nan"), -1, 5, None], 4)
    metrics.timings("latency", [float("nan")], 1)
    metrics.timings("latency", [], 0)
    metrics.timings("latency", [5], 0)  # says less than it holds
    metrics.flush()
    lines = server.lines()
    assert [(value, rate) for name, _, value, rate, _ in lines if name == "perch.latency"] == [("5", None)] * 2
    assert dropped(lines) == {"value": 4}
    metrics.timings("latency", [5], 1)
    metrics.flush()
    assert dropped(server.lines()) == {}


def test_samples_of_too_many_series_are_dropped_and_counted(serve, measure):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    for n in range(130):
        metrics.timings("t", [1], 1, flag=str(n))
    metrics.flush()
    assert dropped(server.lines()) == {"series": 2}


def test_series_beyond_the_bound_are_dropped_and_counted(serve, measure):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address, max_series=10)
    for n in range(15):
        metrics.count("a", flag=str(n))
    metrics.gauge("g", 1)
    metrics.timing("t", 1)
    metrics.count("a", 4, flag="0")  # known: still counted
    metrics.flush()
    lines = server.lines()
    assert sum(int(value) for name, _, value, *_ in lines if name == "perch.a") == 14
    assert dropped(lines) == {"series": 7}
    for n in range(1000):  # nothing of old series stays behind
        metrics.count("b", flag=str(n))
        metrics.flush()
        server.packets()
    assert len(metrics._texts) <= 20


def test_timed_series_are_bounded_apart(serve, measure):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    for n in range(130):
        metrics.timing("t", 1, flag=str(n))
    metrics.flush()
    lines = server.lines()
    assert sum(name == "perch.t" for name, *_ in lines) == 128
    assert dropped(lines) == {"series": 2}


def test_many_series_are_packed_into_packets_below_the_limit(serve, measure):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    for n in range(2000):
        metrics.count("decision.count", n + 1, flag=f"flag-{n}", cohort="canary")
    metrics.flush()
    packets = server.packets()
    assert all(len(packet) < 1432 for packet in packets)
    assert sum(packet.count(b"\n") + 1 for packet in packets) == 2000
    assert len(packets) < 2000 * 60 / 1000


def test_a_line_longer_than_a_packet_is_dropped_and_counted(serve, measure):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    metrics.count("a", flag="x" * 1400)
    metrics.count("a", flag="x" * 10_000_000)
    metrics.gauge("pair", -1, flag="x" * 1000)  # one line fits, the two that a negative gauge needs do not
    metrics.count("b", flag="x" * 1300)
    metrics.flush()
    lines = server.lines()
    assert [name for name, *_ in lines] == ["perch.b", "perch.metrics.dropped"]
    assert dropped(lines) == {"line": 3}


def test_tags_of_the_process_that_fill_a_packet_send_nothing_rather_than_a_longer_one(serve, measure):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address, tags={"host": "x" * 2000})
    metrics.count("a")
    metrics.flush()
    metrics.flush()
    assert server.packets() == []
    assert metrics._dropped == {"line": 1}


def test_off_does_nothing(measure):
    metrics = measure(None)
    metrics.count("a")
    metrics.gauge("a", 1)
    metrics.timing("a", 1)
    metrics.flush()
    assert len(metrics._tally) == 0


@pytest.mark.parametrize("address", ["", "statsd", ":8125", "host:", "host:x", "host:0", "host:65536", "unix:", "h:-1"])
def test_an_address_of_no_known_form_is_refused_in_one_line(address):
    with pytest.raises(ValueError, match=r"^StatsD address .*: write host:port or unix:/path$"):
        Metrics(address)


def until_refused(outlet):
    """What sends through the outlet, and returns when the kernel has its answer, which may come later than `send`."""
    send = outlet.sendto

    def sendto(packet, address):
        send(packet, address)
        refusal = select.poll()
        refusal.register(outlet._socket, 0)
        assert refusal.poll(30_000)

    return sendto


def test_lines_lost_to_a_dead_port_are_reported_once_a_listener_is_there(serve, measure, monkeypatch):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    server.socket.close()
    with monkeypatch.context() as patched:
        patched.setattr(metrics._outlet, "sendto", until_refused(metrics._outlet))
        for _ in range(5):
            metrics.count("lost")
            metrics.flush()
    back = serve(Dialect.DOGSTATSD, address=("127.0.0.1", server.port))
    metrics.count("found")
    metrics.flush()
    lines = back.lines()
    assert ("perch.found", "c", "1", None, []) in lines
    assert dropped(lines)["send"] >= 5
    metrics.count("found")
    metrics.flush()
    assert dropped(back.lines()) == {}


def test_a_unix_listener_that_never_reads_costs_nothing_and_its_loss_is_reported(serve, measure, tmp_path):
    server = serve(Dialect.DOGSTATSD, socket.AF_UNIX, str(tmp_path / "statsd"))
    metrics = measure(f"unix:{tmp_path / 'statsd'}")
    flushes = 1000
    for _ in range(flushes):  # would hang at the first full buffer if the socket could block
        metrics.count("a")
        metrics.flush()
    arrived = sum(name == "perch.a" for name, *_ in server.lines())
    assert arrived < flushes
    metrics.flush()
    assert dropped(server.lines()) == {"send": flushes - arrived}


def test_a_unix_listener_may_come_late_and_be_replaced(serve, measure, tmp_path):
    path = tmp_path / "statsd"
    metrics = measure(f"unix:{path}")
    metrics.count("early")
    metrics.flush()
    first = serve(Dialect.DOGSTATSD, socket.AF_UNIX, str(path))
    metrics.count("a")
    metrics.flush()
    assert sorted(first.lines()) == [
        ("perch.a", "c", "1", None, []),
        ("perch.metrics.dropped", "c", "1", None, ["why:send"]),
    ]
    first.socket.close()
    path.unlink()
    second = serve(Dialect.DOGSTATSD, socket.AF_UNIX, str(path))
    metrics.count("b")
    metrics.flush()
    assert second.lines() == [("perch.b", "c", "1", None, [])]


def flush_until_known(metrics):
    """Wait for the look-up thread: a flush before its end keeps what has gathered."""
    metrics.flush()
    for thread in threading.enumerate():
        if thread.name == "statsd-look-up":
            thread.join(30)
            assert not thread.is_alive()
    metrics.flush()


def test_a_name_is_looked_up_off_the_callers_path_and_nothing_is_lost_meanwhile(serve, measure, monkeypatch):
    server = serve(Dialect.DOGSTATSD)
    answer = threading.Event()
    real = socket.getaddrinfo

    def slow(host, *args, **kwargs):
        if host == "127.0.0.1" or kwargs.get("flags"):
            return real(host, *args, **kwargs)
        assert answer.wait(30)
        return real("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    metrics = measure(f"statsd.example:{server.port}")
    metrics.count("a")
    metrics.flush()
    metrics.count("a")
    metrics.flush()
    assert server.packets() == []
    answer.set()
    flush_until_known(metrics)
    assert server.lines() == [("perch.a", "c", "2", None, [])]


def test_a_name_that_does_not_resolve_is_tried_again_and_its_loss_reported(serve, measure, monkeypatch):
    server = serve(Dialect.DOGSTATSD)

    real = socket.getaddrinfo

    def no_such_name(host, *args, **kwargs):  # a name server that is away would take its time to say so
        if host == "statsd.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    monkeypatch.setattr(datagrams, "_LOOK_UP_RETRY_S", 0.0)
    metrics = measure(f"statsd.invalid:{server.port}")
    metrics.count("a")
    flush_until_known(metrics)
    monkeypatch.setattr(datagrams, "_look_up", lambda *_: datagrams.Peer(socket.AF_INET, ("127.0.0.1", server.port)))
    flush_until_known(metrics)
    flush_until_known(metrics)
    metrics.count("b")
    metrics.flush()
    lines = server.lines()
    assert ("perch.b", "c", "1", None, []) in lines
    assert dropped(lines) == {"send": 1}


def test_ipv6_addresses_are_read(measure):
    try:
        listener = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        listener.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with listener:
        listener.settimeout(30)
        metrics = measure(f"[::1]:{listener.getsockname()[1]}")
        metrics.count("a")
        metrics.flush()
        assert listener.recv(1500) == b"perch.a:1|c"


async def test_run_flushes_by_itself_and_once_more_when_cancelled(serve, measure):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    metrics.count("early")
    running = asyncio.create_task(metrics.run(every_s=0.01))
    lines = await server.next_lines()
    assert lines == [("perch.early", "c", "1", None, [])]
    for n in range(1500):  # several slices: the cancellation may fall between them
        metrics.count("late", flag=str(n))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sum(name == "perch.late" for name, *_ in server.lines()) == 1500


async def test_a_flush_that_is_cut_between_slices_is_finished(serve, measure, monkeypatch):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    monkeypatch.setattr("extproc.metrics._PAUSE_S", 3600)
    for n in range(1500):
        metrics.count("a", flag=str(n))
    running = asyncio.create_task(metrics.run(every_s=0))
    lines = await server.next_lines()
    assert len(lines) == 64
    metrics.count("b")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    rest = server.lines()
    assert sorted({name for name, *_ in rest}) == ["perch.a", "perch.b"]
    assert len(rest) == 1500 - 64 + 1


def test_a_closed_one_takes_calls_and_drops_them(serve, measure):
    server = serve(Dialect.DOGSTATSD)
    metrics = measure(server.address)
    metrics.close()
    metrics.count("a")
    metrics.flush()
    metrics.close()
    assert server.packets() == []
