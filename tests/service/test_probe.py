"""The health check of containers, against the servers that it is for."""

import socket
import subprocess
import sys
import threading

import pytest

PATIENT = "import sys; from extproc import probe; probe.TIMEOUT_S = 60; sys.exit(probe.main(sys.argv[1:]))"


def probe(*arguments, start=("-c", PATIENT)):
    """Exit code and what it says. Unless started as containers do, it waits for a server that stands still."""
    done = subprocess.run(
        [sys.executable, *start, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stderr.strip()


@pytest.fixture
def says():
    """A server on loopback that answers every connection with these bytes and closes it: bytes -> its address."""
    servers = []

    def start(answer):
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def run():
            try:
                while True:
                    peer, _ = server.accept()
                    with peer:
                        peer.recv(65536)
                        peer.sendall(answer)
                        peer.shutdown(socket.SHUT_WR)
                        while peer.recv(65536):
                            pass
            except OSError:
                return

        threading.Thread(target=run, daemon=True).start()
        return f"127.0.0.1:{server.getsockname()[1]}"

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize("transport", ["fast", "grpcio"])
def test_serve_is_ready_once_a_flag_file_was_good(folder, launch, service, transport):
    perch = launch(transport=transport)
    address = f"unix:{folder.socket}"
    perch.wait_for_event("flags_rejected")
    assert probe("grpc", address) == (1, f"{address}: not serving")
    perch.put(service.flags_yaml(5))
    assert probe("grpc", address) == (0, "")
    perch.stop()
    assert probe("grpc", address)[0] == 1


def test_http_wants_a_200_and_shows_what_came_instead(says):
    assert probe("http", says(b"HTTP/1.1 200 OK\r\n\r\nready\n"), "/readyz") == (0, "")
    held = says(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 9\r\n\r\nnot warm\n")
    assert probe("http", held, "/readyz") == (1, f"{held}: not warm")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"\0\0\0\4\1\0\0\0\0\0\0\0\0", b"\0\0"])
def test_what_does_not_speak_grpc_is_not_ready(says, answer):
    assert probe("grpc", says(answer))[0] == 1


def test_nobody_there_is_one_line(tmp_path):
    code, text = probe("grpc", f"unix:{tmp_path}/none.sock")
    assert code == 1
    assert "No such file" in text
    assert "\n" not in text


@pytest.mark.parametrize("arguments", [(), ("http", "127.0.0.1:1"), ("ftp", "x", "/")])
def test_anything_else_is_a_usage_error(arguments):
    code, text = probe(*arguments, start=("-m", "extproc.probe"))
    assert code == 2
    assert text.startswith("usage: ")
