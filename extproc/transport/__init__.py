"""ext_proc transports. Each one turns a connection into calls of one function, answer(bytes) -> bytes."""
