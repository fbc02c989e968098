"""What an entry of Envoy's access log costs on one core: parsed, decoded to an outcome, counted. And what memory does.

The cases take turns, so that noise meets all of them; the ratio is to the C runtime's parse alone, in the same run.
Units come again in each round, request ids do not. What is done once a second for all entries of it has its own line;
a core at its limit has about as many in a second as all rounds have here.
"""

import argparse
import datetime as dt
import random
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envoy_data_plane.envoy.config.core.v3 import Address, Metadata, Pipe, RequestMethod, SocketAddress
from envoy_data_plane.envoy.data.accesslog.v3 import (
    AccessLogCommon,
    AccessLogType,
    HttpAccessLogEntry,
    HttpAccessLogEntryHttpVersion,
    HttpRequestProperties,
    HttpResponseProperties,
)
from envoy_data_plane.envoy.service.accesslog.v3 import (
    StreamAccessLogsMessage,
    StreamAccessLogsMessageHttpAccessLogEntries,
)
from envoy_data_plane.google.protobuf import Struct, Value

from extproc.core.flags import Exposures
from extproc.telemetry import Steps, Telemetry
from extproc.wire import accesslog_pb2 as wire
from extproc.wire.outcomes import read_outcomes

MESSAGES, ENTRIES = 3, 1_400
"""Envoy's 1 MiB hold some 1,400 entries."""
ROUNDS = 40
_UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def shuffled(fields: dict[Any, Any], chance: random.Random) -> dict[Any, Any]:
    """In the order of the moment, as Envoy's maps have it."""
    return dict(chance.sample(list(fields.items()), len(fields)))


def uuid(chance: random.Random) -> str:
    """A request id as Envoy makes them."""
    digits = f"{chance.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def entry(flags: int, chance: random.Random) -> HttpAccessLogEntry:
    """An inference, with all that Envoy 1.40 writes about it; of one of so many flags, each of a model of its own."""
    model = f"digits{chance.randrange(flags)}"
    arm = "canary" if chance.random() < 0.1 else "stable"
    peer = Address(socket_address=SocketAddress(address="127.0.0.1", port_value=chance.randrange(32768, 60999)))
    sent, took = dt.timedelta(microseconds=chance.randrange(300, 900)), dt.timedelta(seconds=chance.expovariate(200))
    said: dict[str, Any] = dict.fromkeys(("flag", "model"), Value(string_value=model))
    said |= {"cohort": Value(string_value=arm), "reason": Value(string_value="SPLIT")}
    said |= {"version": Value(string_value="0123456789ab.7"), "hash": Value(number_value=chance.getrandbits(32))}
    request_id = uuid(chance)
    return HttpAccessLogEntry(
        common_properties=AccessLogCommon(
            downstream_remote_address=peer,
            downstream_local_address=peer,
            downstream_direct_remote_address=peer,
            upstream_remote_address=Address(pipe=Pipe(path=f"/run/perch/{model}-{arm}-0.sock")),
            upstream_cluster=f"{model}_{arm}",
            start_time=dt.datetime.fromtimestamp(1.8e9 + chance.random(), dt.UTC),
            time_to_last_rx_byte=sent,
            time_to_first_upstream_tx_byte=sent,
            time_to_last_upstream_tx_byte=sent,
            time_to_first_upstream_rx_byte=sent + took,
            time_to_last_upstream_rx_byte=sent + took,
            time_to_first_downstream_tx_byte=sent + took,
            time_to_last_downstream_tx_byte=sent + took,
            duration=sent + took,
            metadata=Metadata(filter_metadata={"perch": Struct(fields=shuffled(said, chance))}),
            route_name=f"{model}.{arm}",
            custom_tags=shuffled({"cohort": arm, "served": arm, "failed_open": "0"}, chance),
            upstream_request_attempt_count=1,
            stream_id=request_id,
            downstream_wire_bytes_sent=891,
            downstream_wire_bytes_received=2521,
            upstream_wire_bytes_sent=2570,
            upstream_wire_bytes_received=826,
            access_log_type=AccessLogType.DownstreamEnd,
        ),
        protocol_version=HttpAccessLogEntryHttpVersion.HTTP11,
        request=HttpRequestProperties(
            request_method=RequestMethod.POST,
            scheme="http",
            authority="127.0.0.1:10000",
            path=f"/v2/models/{model}/infer",
            user_agent="Python/3.13 aiohttp/3.14",
            forwarded_for="127.0.0.1",
            request_id=request_id,
            request_headers_bytes=414,
            request_body_bytes=2190,
            request_headers={"x-model-cohort": arm},
            upstream_header_bytes_sent=414,
            downstream_header_bytes_received=201,
        ),
        response=HttpResponseProperties(
            response_code=200,
            response_headers_bytes=288,
            response_body_bytes=chance.randrange(500, 600),
            response_headers={
                "x-model-version": f"2-{arm}",
                "x-model-prediction": str(chance.randrange(10)),
                "x-model-prediction-count": "1",
            },
            response_code_details="via_upstream",
            upstream_header_bytes_received=245,
            downstream_header_bytes_sent=318,
        ),
    )


def messages(flags: int) -> list[bytes]:
    """What Envoy sends of 3,400 requests."""
    chance = random.Random(7)  # noqa: S311  the same entries in each run
    return [
        bytes(
            StreamAccessLogsMessage(
                http_logs=StreamAccessLogsMessageHttpAccessLogEntries(
                    log_entry=[entry(flags, chance) for _ in range(ENTRIES)]
                )
            )
        )
        for _ in range(MESSAGES)
    ]


def with_new_ids(message: bytes, chance: random.Random) -> bytes:
    """The same entries of other requests."""
    return _UUID.sub(lambda _found: uuid(chance).encode(), message)


def parse(message: bytes) -> None:
    """What the C runtime does for a message, and nothing else."""
    entries = wire.StreamAccessLogsMessage.FromString(message).http_logs.log_entry[:]
    wire.HTTPAccessLogEntry.FromString(b"".join(entries))


@dataclass
class Counted:
    """Decodes messages and counts them as `perch control` does."""

    telemetry: Telemetry = field(default_factory=lambda: Telemetry(Steps(lambda _version: Exposures())))

    def take(self, message: bytes) -> None:
        """What is done for each message."""
        self.telemetry.take(read_outcomes(message).outcomes, time.monotonic())

    def settle_us(self, entries: int) -> float:
        """Does what is done each second; microseconds of one core per entry since the last time."""
        began_s = time.process_time()
        self.telemetry.windows.settle()
        return (time.process_time() - began_s) / entries * 1e6


def microseconds(cases: dict[str, tuple[Callable[[bytes], Any], list[bytes]]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of one core per entry, a figure a round."""
    chance = random.Random(13)  # noqa: S311  the same ids in each run
    measured: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (call, known) in cases.items():
            texts = [with_new_ids(text, chance) for text in known]
            began_s = time.process_time()
            for text in texts:
                call(text)
            measured[name].append((time.process_time() - began_s) / (len(texts) * ENTRIES) * 1e6)
    return measured


def unlike_messages(count: int) -> Iterable[bytes]:
    """So many entries, each with texts that no other has: nothing can be looked up, and nothing should be kept."""
    chance = random.Random(11)  # noqa: S311  the same entries in each run
    for start in range(0, count, ENTRIES):
        logs = wire.StreamAccessLogsMessage.HTTPAccessLogEntries(
            log_entry=[_unlike(number, chance) for number in range(start, min(start + ENTRIES, count))]
        )
        yield wire.StreamAccessLogsMessage(http_logs=logs).SerializeToString()


def _unlike(number: int, chance: random.Random) -> bytes:
    name = f"{number:x}-{chance.getrandbits(64):x}".encode()
    texts = {key: wire.Value(string_value=name) for key in (b"flag", b"model", b"cohort", b"reason", b"version")}
    said = shuffled(texts | {b"hash": wire.Value(number_value=number)}, chance)
    fields = [wire.Value.Entry(key=key, value=value).SerializeToString() for key, value in said.items()]
    perch = wire.Metadata.Entry(key=b"perch", value=wire.Struct(fields=fields))
    header = wire.Text(key=b"x-model-prediction", value=b"0." + name).SerializeToString()
    common = wire.AccessLogCommon(
        start_time=wire.Interval(seconds=[1_800_000_000]),
        duration=wire.Interval(nanos=[number % 10**9]),
        metadata=[wire.Metadata(filter_metadata=[perch]).SerializeToString()],
        route_name=[name + b".stable"],
        custom_tags=[wire.Text(key=b"model_version", value=name).SerializeToString()],
        stream_id=[name],
        access_log_type=[6],
    )
    response = wire.HTTPResponseProperties(response_headers=[header])
    return wire.HTTPAccessLogEntry(common_properties=common, response=response).SerializeToString()


def resident_mib() -> float:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_now_mib() -> float:
    """The memory that this process has now: dictionaries that are made anew have had more in between."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    """Prints a table of medians and least values, and the memory before and after many entries that are all unlike."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--unlike", type=int, default=200_000, help="entries of the memory's measurement")
    options.add_argument("--counted", type=int, default=0, help="only: the memory while so many entries are counted")
    wanted = options.parse_args()
    if wanted.counted:
        _counted_memory(wanted.counted)
        return
    few, many = messages(1), messages(100)
    print(f"{MESSAGES * ENTRIES} entries of {sum(map(len, few)) / MESSAGES / ENTRIES:.0f} bytes, {ENTRIES} a message")
    counted = {"few": Counted(), "many": Counted()}
    cases: dict[str, tuple[Callable[[bytes], Any], list[bytes]]] = {
        "parse (C runtime alone)": (parse, few),
        "decode to outcomes": (read_outcomes, few),
        "decode, 100 flags": (read_outcomes, many),
        "decode and count": (counted["few"].take, few),
        "decode and count, 100 flags": (counted["many"].take, many),
    }
    microseconds(cases, 1)
    for one in counted.values():
        one.settle_us(MESSAGES * ENTRIES)
    measured = microseconds(cases, ROUNDS)
    alone = measured["parse (C runtime alone)"]
    print(f"{'':<30}{'median':>10}{'least':>10}{'entries/s':>12}{'/ parse':>10}")
    for name, figures in measured.items():
        middle = statistics.median(figures)
        ratio = statistics.median(one / base for one, base in zip(figures, alone, strict=True))
        print(f"{name:<30}{middle:>7.2f} us{min(figures):>7.2f} us{1e6 / middle:>12,.0f}{ratio:>9.1f}x")
    for name, one in (("once a second", counted["few"]), ("once a second, 100 flags", counted["many"])):
        print(f"{name:<30}{one.settle_us(ROUNDS * MESSAGES * ENTRIES):>7.2f} us")
    _memory(wanted.unlike)


def _counted_memory(count: int) -> None:
    """Of the whole telemetry, with the requests that labels can join: it must not grow once a million are kept."""
    chance, counted, known = random.Random(17), Counted(), messages(100)  # noqa: S311  the same ids in each run
    told, done = 1, 0
    while done < count:
        for message in known:
            counted.take(with_new_ids(message, chance))
        done += MESSAGES * ENTRIES
        counted.settle_us(MESSAGES * ENTRIES)
        if done * 10 >= told * count:
            print(f"{done:>12,} entries counted  {resident_now_mib():7.1f} MiB", flush=True)
            told = done * 10 // count + 1


def _memory(count: int) -> None:
    """The look-ups are full before the first figure of memory is taken, and of no use: the time is the longest."""
    took_s = 0.0
    for done, message in enumerate(unlike_messages(count), start=1):
        began_s = time.process_time()
        read_outcomes(message)
        took_s += time.process_time() - began_s
        if done * ENTRIES >= count // 4 > (done - 1) * ENTRIES:
            early_mib = resident_mib()
    mean_us = took_s / count * 1e6
    print(f"{'decode, all unlike (mean)':<30}{mean_us:>7.2f} us{'':>10}{1e6 / mean_us:>12,.0f}")
    early = f"{early_mib:.1f} MiB after {count // 4:,} entries that are all unlike"
    print(f"memory: {early}, {resident_mib():.1f} MiB after {count:,}")


if __name__ == "__main__":
    main()
