"""The projection protos: what is committed is what protoc makes of them, and their numbers are Envoy's."""

import dataclasses
from pathlib import Path

import pytest
from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue, Metadata, Node
from envoy_data_plane.envoy.data.accesslog import v3 as accesslog
from envoy_data_plane.envoy.service.accesslog import v3 as accesslog_service
from envoy_data_plane.envoy.service.ext_proc.v3 import HttpHeaders, ProcessingRequest
from envoy_data_plane.google.protobuf import Duration, Struct, Timestamp, UInt32Value, Value
from google.protobuf.descriptor import FieldDescriptor

from extproc.wire import accesslog_pb2, ext_proc_pb2
from extproc.wire.generate import HERE, PROTOS, generate

TWINS = [
    (ext_proc_pb2.HeaderValue, HeaderValue),
    (ext_proc_pb2.HeaderMap, HeaderMap),
    (ext_proc_pb2.HttpHeaders, HttpHeaders),
    (ext_proc_pb2.ProcessingRequest, ProcessingRequest),
    (accesslog_pb2.StreamAccessLogsMessage, accesslog_service.StreamAccessLogsMessage),
    (accesslog_pb2.StreamAccessLogsMessage.Identifier, accesslog_service.StreamAccessLogsMessageIdentifier),
    (
        accesslog_pb2.StreamAccessLogsMessage.HTTPAccessLogEntries,
        accesslog_service.StreamAccessLogsMessageHttpAccessLogEntries,
    ),
    (accesslog_pb2.Node, Node),
    (accesslog_pb2.HTTPAccessLogEntry, accesslog.HttpAccessLogEntry),
    (accesslog_pb2.AccessLogCommon, accesslog.AccessLogCommon),
    (accesslog_pb2.HTTPResponseProperties, accesslog.HttpResponseProperties),
    (accesslog_pb2.ResponseFlags, accesslog.ResponseFlags),
    (accesslog_pb2.Interval, Duration),
    (accesslog_pb2.Interval, Timestamp),
    (accesslog_pb2.Status, UInt32Value),
    (accesslog_pb2.Metadata, Metadata),
    (accesslog_pb2.Struct, Struct),
    (accesslog_pb2.Value, Value),
]

VARINT, FIXED64, DELIMITED = 0, 1, 2
WIRE_TYPES = {
    "double": FIXED64,
    **dict.fromkeys(("bool", "enum", "int32", "int64", "uint32", "uint64"), VARINT),
    **dict.fromkeys(("bytes", "string", "message", "map"), DELIMITED),
}
NAMES = {
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_MESSAGE: "message",
}


def numbers(message):
    """Envoy's fields by name: the number and the wire type."""
    fields = {one.name: one.metadata["betterproto"] for one in dataclasses.fields(message)}
    return {name: (one.number, WIRE_TYPES[one.proto_type]) for name, one in fields.items()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_committed_is_what_protoc_makes(tmp_path):
    generate(tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(f"{proto.stem}_pb2.{end}" for proto in PROTOS for end in ("py", "pyi"))
    for name in made:
        assert (tmp_path / name).read_bytes() == (HERE / name).read_bytes(), f"run `make protos`: {name} is not current"


@pytest.mark.parametrize(("ours", "envoys"), TWINS, ids=lambda one: one.__name__)
def test_every_field_has_the_number_and_the_wire_type_that_envoys_proto_gives_it(ours, envoys):
    fields = {one.name: (one.number, WIRE_TYPES[NAMES[one.type]]) for one in ours.DESCRIPTOR.fields}
    assert fields.items() <= numbers(envoys).items()


def test_every_phase_that_envoy_can_send_is_known():
    phases = {field.name for field in ext_proc_pb2.ProcessingRequest.DESCRIPTOR.oneofs_by_name["phase"].fields}
    envoys = {
        field.name
        for field in dataclasses.fields(ProcessingRequest)
        if getattr(field.metadata["betterproto"], "group", None)
    }
    assert phases == envoys


def test_the_protos_are_beside_their_code():
    assert [Path(proto).name for proto in PROTOS] == ["accesslog.proto", "ext_proc.proto"]
