"""Where a transport listens, and what it says when it cannot."""

import os
import socket
import stat
from pathlib import Path

import pytest

from extproc.transport.errors import ListenError
from extproc.transport.listen import open_listener


@pytest.fixture
def listen():
    opened = []

    def one(address: str):
        opened.append(open_listener(address))
        return opened[-1]

    yield one
    for listener in opened:
        listener.socket.close()


def test_port_0_becomes_a_real_port(listen):
    host, _, port = listen("127.0.0.1:0").address.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0


def test_an_ipv6_address_keeps_its_brackets(listen):
    try:
        address = listen("[::1]:0").address
    except ListenError as error:
        pytest.skip(str(error))
    assert address.startswith("[::1]:")


def test_the_socket_file_and_its_new_folder_are_the_owners_alone(listen, tmp_path):
    assert listen(f"unix:{tmp_path}/run/p.sock").address == f"unix:{tmp_path}/run/p.sock"
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "run/p.sock").stat().st_mode) == 0o700


def test_the_process_keeps_its_own_umask(listen, tmp_path):
    before = os.umask(0o022)
    try:
        listen(f"unix:{tmp_path}/p.sock")
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_a_socket_file_nobody_serves_is_replaced(listen, tmp_path):
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "p.sock"))
    left.close()
    assert listen(f"unix:{tmp_path}/p.sock")


def test_a_socket_that_is_served_is_left_alone_with_a_clear_error(listen, tmp_path):
    listen(f"unix:{tmp_path}/p.sock")
    inode = (tmp_path / "p.sock").stat().st_ino
    with pytest.raises(ListenError, match=r"cannot listen on unix:.*p\.sock: another process serves there; stop it or"):
        listen(f"unix:{tmp_path}/p.sock")
    assert (tmp_path / "p.sock").stat().st_ino == inode


def test_a_file_that_is_no_socket_is_never_removed(listen, tmp_path):
    (tmp_path / "p.sock").write_text("precious")
    with pytest.raises(ListenError, match="a file that is not a socket is there; choose another path"):
        listen(f"unix:{tmp_path}/p.sock")
    assert (tmp_path / "p.sock").read_text() == "precious"


def test_a_taken_port_is_a_clear_error(listen):
    taken = listen("127.0.0.1:0").address
    with pytest.raises(ListenError, match=f"cannot listen on {taken}: Address already in use; choose another --listen"):
        listen(taken)


@pytest.mark.parametrize("address", ["", "nonsense", ":1", "host:", "host:x", "127.0.0.1:65536", "127.0.0.1:-1"])
def test_an_address_that_is_none_is_a_clear_error(address, listen):
    with pytest.raises(ListenError, match="write unix:PATH or HOST:PORT"):
        listen(address)


@pytest.mark.parametrize("path", ["", "/tmp/" + "x" * 120])
def test_a_path_that_does_not_fit_is_a_clear_error(path, listen):
    with pytest.raises(ListenError, match="the path must be 1 to 107 bytes long"):
        listen(f"unix:{path}")


def test_a_host_that_does_not_exist_is_a_clear_error(listen):
    with pytest.raises(ListenError, match=r"cannot listen on no\.such\.host\.invalid:1: "):
        listen("no.such.host.invalid:1")


def test_the_file_is_removed_only_while_it_is_ours(listen, tmp_path):
    path = tmp_path / "p.sock"
    listener = listen(f"unix:{path}")
    path.unlink()
    successor = socket.socket(socket.AF_UNIX)
    successor.bind(str(path))
    listener.remove_file()
    successor.close()
    assert path.exists()
    ours = listen(f"unix:{tmp_path}/q.sock")
    ours.remove_file()
    ours.remove_file()
    assert not Path(f"{tmp_path}/q.sock").exists()
