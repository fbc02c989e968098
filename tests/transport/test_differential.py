"""The same 10,000 requests over both transports get byte for byte the replies that the answer gives without one."""

import asyncio
import random

import grpc
import pytest

from extproc.core.flags import Exposures
from extproc.core.ruleset import compile_ruleset
from extproc.core.schema import parse
from extproc.flagyaml import read_document
from extproc.transport.fastlane import FastLane
from extproc.transport.grpcio import GrpcioTransport
from extproc.wire.answer import Answerer, Published
from extproc.wire.ext_proc_pb2 import HeaderValue, ProcessingRequest
from extproc.wire.replies import OTHER_PHASES, replies

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
REQUESTS = 10_000
STREAMS = 25
MODELS = {"digits": "/v2/models/digits/", "letters": "/v2/models/letters/"}
FLAGS = b"""
version: 1
flags:
  digits: {unit: [x-user-id, x-session-id], salt: d, canary: 50}
  letters: {model: letters, salt: l, canary: 5}
"""
NAMES = [b":path", b":method", b":authority", b"x-user-id", b"x-session-id", b"x-force-cohort", b"x-request-id", b"x"]
PATHS = [b"/v2/models/digits/infer", b"/v2/models/letters/infer", b"/other", b"", b"/v2/models/digits/\xff"]


def make_answer() -> Answerer:
    ruleset = compile_ruleset(parse(read_document(FLAGS), MODELS).flags, Exposures(), MODELS, version="v.1")
    return Answerer(Published(ruleset, replies(ruleset.choices, "v.1"), OTHER_PHASES))


def random_request(chance: random.Random) -> bytes:
    """Mostly requests in their header phase; some in other phases, some cut short, some no messages at all."""
    request = ProcessingRequest()
    for _ in range(chance.randrange(12)):
        name = chance.choice(NAMES)
        value = chance.choice(PATHS) if name == b":path" else chance.randbytes(chance.randrange(40))
        field = chance.choice(["value", "raw_value"])
        request.request_headers.headers.headers.append(HeaderValue(key=name, **{field: value}).SerializeToString())
    kind = chance.random()
    if kind < 0.05:
        phase = chance.choice(["response_headers", "request_body", "response_body", "request_trailers"])
        setattr(request, phase, chance.randbytes(chance.randrange(50)))
    if kind > 0.98:
        return chance.randbytes(chance.randrange(100))
    whole = request.SerializeToString()
    return whole[: chance.randrange(len(whole) + 1)] if kind > 0.95 else whole


async def ask(transport_class: type, requests: list[bytes], address: str) -> list[bytes]:
    """The replies of one transport, asked over many streams at once."""
    transport = transport_class(make_answer(), lambda: True)
    size = len(requests) // STREAMS

    async def stream(channel: grpc.aio.Channel, start: int) -> list[bytes]:
        call = channel.stream_stream(PROCESS)(iter(requests[start : start + size]))
        return [reply async for reply in call]

    async with grpc.aio.insecure_channel(await transport.start(address)) as channel:
        parts = await asyncio.gather(*(stream(channel, start) for start in range(0, len(requests), size)))
    await transport.stop(1.0)
    return [reply for part in parts for reply in part]


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_both_transports_give_the_same_replies_as_the_answer_itself(tmp_path):
    chance = random.Random(5)
    requests = [random_request(chance) for _ in range(REQUESTS)]
    answer = make_answer()
    expected = [answer(request) for request in requests]
    assert len(set(expected)) > 1_000  # not the same reply to everything
    for transport_class in (FastLane, GrpcioTransport):
        assert await ask(transport_class, requests, f"unix:{tmp_path}/{transport_class.__name__}") == expected
