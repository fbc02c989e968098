"""The three kinds of failure, by whose fault they are: the client's, the operator's, nobody's (too busy)."""

from http import HTTPStatus


class Refused(Exception):  # noqa: N818  it is an answer to a request, not an error of the server
    """A request that is answered with an HTTP status and a sentence; raised by everything that reads requests."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.status = status


class ArtifactError(Exception):
    """A model that cannot be served: missing, corrupt, or not what its manifest says. Ends the start with exit 1."""
