"""What `perch check` says about headers that never arrive, asked of the real Envoy."""

import asyncio
from pathlib import Path

from extproc.core.advice import NOT_FORWARDED
from extproc.envoyfile import EnvoySettings, forwarded_headers, render_filter

NAMES = sorted({*NOT_FORWARDED, "x-perch-anything"})
ARRIVES = ("x-tenant", "x-envoy-external-address", "x-client-request-id", "accept-language", "content-type")


ONE_SERVER = EnvoySettings(run_dir=Path("/run/perch"), ext_proc=("unix:a.sock",), access_log="unix:als.sock")


async def ask(port: int, lines: list[str]) -> bytes:
    """One request as bytes, because an HTTP client would not send some of these headers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = ["POST /v2/models/digits/infer HTTP/1.1", "content-length: 2", *lines, "", "{}"]
    writer.write("\r\n".join(head).encode())
    status = await asyncio.wait_for(reader.readline(), 20)
    writer.close()
    return status


async def test_headers_that_are_said_never_to_arrive_do_not_and_others_do(running, a_model):
    """Each is forwarded by the filter's configuration, and still no client's value of it reaches perch."""

    def forward_all(files):
        forwarded = forwarded_headers([*NAMES, *ARRIVES])
        patient = render_filter(forwarded, ONE_SERVER).replace('message_timeout: "0.5s"', 'message_timeout: "10s"')
        assert "x-perch-anything" in patient
        return files | {"ecds.yaml": patient}

    async with running([a_model("digits")], forward_all) as edge:
        for name in NAMES:
            value = "close" if name == "connection" else "forged"
            host = [] if name == "host" else ["host: edge"]
            transfer = name == "transfer-encoding"
            shown_before = len(edge.decider.seen)
            status = await ask(edge.port, [*host, f"{name}: {value}"])
            if transfer:  # not a transfer coding: Envoy refuses the request
                assert b" 200 " not in status
                continue
            assert b" 200 " in status, (name, status)
            (shown,) = edge.decider.seen[shown_before:]
            assert shown.get(name) not in (b"forged", b"close"), name
        others = ["host: edge", "x-tenant: acme", "accept-language: de", "x-request-id: mine", "content-type: a/b"]
        await ask(edge.port, others)
        shown = edge.decider.seen[-1]
        assert (shown["x-tenant"], shown["accept-language"], shown["content-type"]) == (b"acme", b"de", b"a/b")
        assert shown["x-client-request-id"] == b"mine"
        assert shown["x-envoy-external-address"] == b"127.0.0.1"
