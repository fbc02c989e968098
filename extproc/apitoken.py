"""Who may write to the control API: whoever shows its token. Reading is free."""

import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

MIN_TOKEN_CHARACTERS = 16
MAX_TOKEN_BYTES = 4096
READING = {"GET", "HEAD", "OPTIONS"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class TokenError(Exception):
    """The token's file cannot be used. One line."""


def read_token(path: Path) -> str | None:
    """The token in a file, white space around it not counted; None for an empty file. Raises TokenError."""
    try:
        with path.open("rb") as file:
            token = file.read(MAX_TOKEN_BYTES).decode("ascii").strip()
    except OSError as error:
        raise TokenError(f"{path}: {error.strerror}; it must be readable for the user that control runs as") from None
    except UnicodeDecodeError:
        raise TokenError(f"{path}: a token has plain characters only; make one with: openssl rand -hex 32") from None
    if token and len(token) < MIN_TOKEN_CHARACTERS:
        raise TokenError(
            f"{path}: a token needs {MIN_TOKEN_CHARACTERS} characters; make one with: openssl rand -hex 32"
        )
    return token or None


def writing_needs(token: str | None, *, open_without: bool) -> Any:
    """A middleware: requests that are no mere reading need `Authorization: Bearer TOKEN`.

    Without a token they pass if `open_without`, which is for an address that only this machine reaches, else none does.
    """
    expected = None if token is None else f"Bearer {token}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method in READING or (expected is None and open_without):
            return await handler(request)
        if expected is None:
            text = "nobody may write: this API has no token; set PERCH_TOKEN or PERCH_TOKEN_FILE for control"
            return web.json_response({"error": text}, status=403)
        shown = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(shown, expected):
            text = "writing needs the header `Authorization: Bearer TOKEN` with the token of this API"
            return web.json_response({"error": text}, status=401, headers={"www-authenticate": "Bearer"})
        return await handler(request)

    return check
