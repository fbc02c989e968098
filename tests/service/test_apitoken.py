"""Who may write to the control API, over real sockets."""

import aiohttp
import pytest
from aiohttp import web

from extproc.address import parse_address
from extproc.apitoken import read_token, writing_needs
from extproc.control import is_of_this_machine

TOKEN = "correct-horse-battery"


@pytest.fixture
async def api():
    """Starts an API of one path behind the middleware: (token, open_without) -> what sends a request to it."""
    opened = []

    async def start(token, *, open_without=False):
        async def answer(_request):
            return web.Response(text="done")

        app = web.Application(middlewares=[writing_needs(token, open_without=open_without)])
        app.router.add_route("*", "/", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        session = aiohttp.ClientSession()
        opened.extend((session.close, runner.cleanup))
        url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/"

        async def send(method, authorization=None):
            headers = {} if authorization is None else {"authorization": authorization}
            async with session.request(method, url, headers=headers) as got:
                return got.status, await got.text()

        return send

    yield start
    for close in opened:
        await close()


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_every_method_that_is_no_reading_needs_the_token(api, method):
    send = await api(TOKEN)
    assert (await send(method))[0] == 401
    for wrong in (TOKEN, f"bearer {TOKEN}", f"Bearer {TOKEN}x", "Bearer", "Bearer Ünïcode-correct-horse"):
        assert (await send(method, wrong))[0] == 401
    assert await send(method, f"Bearer {TOKEN}") == (200, "done")


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_reading_is_free(api, method):
    assert (await (await api(TOKEN))(method))[0] == 200
    assert (await (await api(None))(method))[0] == 200


async def test_without_a_token_nobody_writes_unless_the_address_is_of_this_machine(api):
    status, text = await (await api(None))("POST", "Bearer ")
    assert status == 403
    assert "PERCH_TOKEN" in text
    assert (await (await api(None, open_without=True))("POST"))[0] == 200


async def test_a_token_holds_on_this_machine_too(api):
    assert (await (await api(TOKEN, open_without=True))("POST"))[0] == 401


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("127.0.0.1:8900", True),
        ("127.8.9.1:8900", True),
        ("[::1]:8900", True),
        ("unix:/run/c.sock", True),
        ("0.0.0.0:8900", False),
        ("[::]:8900", False),
        ("10.0.0.7:8900", False),
        ("localhost:8900", False),  # whatever that resolves to
    ],
)
def test_of_this_machine_is_loopback_by_number_or_a_socket(address, private):
    assert is_of_this_machine(parse_address(address)) is private


def test_a_token_file_may_end_with_a_newline_and_an_empty_one_is_no_token(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(file) == TOKEN
    file.write_text("\n")
    assert read_token(file) is None
