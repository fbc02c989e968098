"""The projection protos: what is committed is what protoc makes of them, and their numbers are Envoy's."""

from pathlib import Path

import pytest
from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue
from envoy_data_plane.envoy.service.ext_proc.v3 import HttpHeaders, ProcessingRequest

from extproc.wire import ext_proc_pb2
from extproc.wire.generate import HERE, PROTOS, generate

TWINS = {
    "HeaderValue": HeaderValue,
    "HeaderMap": HeaderMap,
    "HttpHeaders": HttpHeaders,
    "ProcessingRequest": ProcessingRequest,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_committed_is_what_protoc_makes(tmp_path):
    generate(tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(f"{proto.stem}_pb2.{end}" for proto in PROTOS for end in ("py", "pyi"))
    for name in made:
        assert (tmp_path / name).read_bytes() == (HERE / name).read_bytes(), f"run `make protos`: {name} is not current"


@pytest.mark.parametrize("name", TWINS)
def test_every_field_has_the_number_that_envoys_proto_gives_it(name):
    envoys = {field.name: field.metadata["betterproto"].number for field in _fields(TWINS[name])}
    ours = {field.name: field.number for field in ext_proc_pb2.DESCRIPTOR.message_types_by_name[name].fields}
    assert ours.items() <= envoys.items()


def _fields(message):
    import dataclasses

    return dataclasses.fields(message)


def test_every_phase_that_envoy_can_send_is_known():
    phases = {field.name for field in ext_proc_pb2.ProcessingRequest.DESCRIPTOR.oneofs_by_name["phase"].fields}
    envoys = {
        field.name for field in _fields(ProcessingRequest) if getattr(field.metadata["betterproto"], "group", None)
    }
    assert phases == envoys


def test_the_protos_are_beside_their_code():
    assert [Path(proto).name for proto in PROTOS] == ["ext_proc.proto"]
