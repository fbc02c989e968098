"""The failures, by whose fault they are: the client's or the load's (`Refused`), the operator's (`ArtifactError`)."""

from http import HTTPStatus


class Refused(Exception):  # noqa: N818  it is an answer to a request, not an error of the server
    """A request that is answered with an HTTP status and a sentence.

    Raised by everything that reads requests, and free for a model of one's own to raise for input it cannot take.
    """

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.status = status


class NotWarm(Exception):  # noqa: N818  likewise
    """A request that came before the model was warm: no model has seen it, and another server may take it."""


class ArtifactError(Exception):
    """A model that cannot be served: missing, corrupt, or not what its manifest says. Ends the start with exit 1."""
