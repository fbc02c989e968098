"""The flag file's JSON Schema, for editors: they complete keys, show what each means, and mark what is wrong.

Draft 7, which every YAML plugin reads. It says what one key may hold; what only `perch check` can know (models, steps
that go up, expressions that compile) stays with `perch check`.
"""

import json
from typing import Any

from extproc.core.schema import FlagFileModel


def flag_schema() -> dict[str, Any]:
    """The schema as plain data."""
    schema = FlagFileModel.model_json_schema(ref_template="#/definitions/{model}")
    schema["definitions"] = schema.pop("$defs")
    schema.pop("title", None)
    cleaned: dict[str, Any] = _cleaned(schema)
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "perch flag file", **cleaned}


def schema_text() -> str:
    """The schema as the file that ships."""
    return json.dumps(flag_schema(), indent=1, ensure_ascii=False) + "\n"


def _cleaned(node: Any) -> Any:
    """Without pydantic's titles, and without null, which no key of the file takes."""
    if isinstance(node, list):
        return [_cleaned(each) for each in node]
    if not isinstance(node, dict):
        return node
    out = {}
    for key, value in node.items():
        if key in {"properties", "definitions"}:
            out[key] = {name: _cleaned(inner) for name, inner in value.items()}
        elif not (key == "title" or (key == "default" and value in (None, "", [], {}))):
            out[key] = _cleaned(value)
    return _without_null(out)


def _without_null(node: dict[str, Any]) -> dict[str, Any]:
    choices = node.get("anyOf")
    if choices is None or {"type": "null"} not in choices:
        return _with_own_description(node)
    left = [each for each in choices if each != {"type": "null"}]
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    if len(left) > 1:
        return {"anyOf": left, **rest}
    return _with_own_description({**left[0], **rest})


def _with_own_description(node: dict[str, Any]) -> dict[str, Any]:
    """In draft 7 what stands beside a reference is not read, so the reference goes one level down."""
    if "$ref" not in node or len(node) == 1:
        return node
    return {"allOf": [{"$ref": node["$ref"]}], **{key: value for key, value in node.items() if key != "$ref"}}
