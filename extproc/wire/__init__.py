"""The only code that knows protobuf bytes: bytes to Request, Decision to bytes."""
