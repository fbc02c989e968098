"""pydantic's errors as problems with places: what is wrong, at which line, and what to write instead."""

import difflib
from collections.abc import Collection, Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from extproc.core.document import Document, Path, Problem, dotted
from extproc.core.scalars import shown

Model = TypeVar("Model", bound=BaseModel)


def validated(document: Document, model: type[Model]) -> tuple[Model | None, list[Problem]]:
    """The document as a model, or None with every problem that the model finds in it."""
    try:
        return model.model_validate(document.data), []
    except ValidationError as error:
        problems: list[Problem] = []
        for detail in error.errors(include_url=False):
            path = _path_in(document.data, detail["loc"])
            problems.extend(_problems(document, model, path, detail))
        return None, problems


def nothing_written(document: Document) -> Iterator[Problem]:
    """A key or a list item without a value: YAML makes it null, and null means nothing in our files."""
    stack: list[tuple[Path, Any]] = [((), document.data)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict):
            stack.extend(((*path, key), inner) for key, inner in value.items())
        elif isinstance(value, list):
            stack.extend(((*path, i), inner) for i, inner in enumerate(value))
        elif value is None:
            yield document.problem(path, "nothing is written here; write a value or take this out")


def nearest(word: str, known: Collection[str]) -> str | None:
    """The known word that was probably meant."""
    close = difflib.get_close_matches(word, known, n=1)
    return close[0] if close else None


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys of a model as people write them."""
    return [field.alias or name for name, field in model.model_fields.items()]


def meant(data: Any, key: str, known: Collection[str]) -> bool:
    """Whether an unknown key of this mapping is probably `key` misspelt: one mistake is not told twice."""
    return isinstance(data, dict) and any(
        nearest(word, known) == key for word in data if isinstance(word, str) and word not in known
    )


def without_repetition(problems: Collection[Problem]) -> list[Problem]:
    """The first problem of each place: what comes after it there is mostly the same thing seen by another check."""
    first: dict[tuple[int, int], Problem] = {}
    for problem in problems:
        first.setdefault((problem.place.line, problem.place.column), problem)
    return list(first.values())


def _path_in(data: Any, loc: Path) -> Path:
    """Pydantic's location without the steps that are names of its own and not keys of the document."""
    path: list[str | int] = []
    for i, step in enumerate(loc):
        inside = step in data if isinstance(data, dict) else isinstance(step, int) and isinstance(data, list)
        if inside:
            path.append(step)
            data = data[step]
        elif i == len(loc) - 1 and isinstance(data, dict):
            path.append(step)
    return tuple(path)


def _problems(document: Document, model: type[BaseModel], path: Path, detail: Any) -> Iterator[Problem]:
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    match kind:
        case "extra_forbidden":
            yield document.problem(path, _unknown_key(model, path), of_key=True)
        case "missing":
            if not meant(value, str(path[-1]), keys_of(_model_at(model, path[:-1]))):
                yield Problem(document.place_of(path[:-1], of_key=True), dotted(path), "this key is missing")
        case _:
            yield document.problem(path, _message(kind, context, value, str(detail["msg"])))


def _message(kind: str, context: Any, value: Any, otherwise: str) -> str:
    match kind:
        case "value_error":
            return str(context["error"])
        case "literal_error":
            return f"write {context['expected']}, not {shown(value)}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"expected a mapping of keys, not {shown(value)}"
        case "list_type":
            instead = f"; write [{shown(value)}]" if isinstance(value, str | int) else ""
            return f"expected a list, not {shown(value)}{instead}"
        case "too_short":
            return "the list is empty; write at least one entry or take the key out"
        case "too_long":
            return f"the list has {context['actual_length']} entries; at most {context['max_length']} are read"
        case _:
            return otherwise


def _unknown_key(model: type[BaseModel], path: Path) -> str:
    known = keys_of(_model_at(model, path[:-1]))
    hint = nearest(str(path[-1]), known)
    return "unknown key" + (f"; did you mean {hint}?" if hint else f"; known are {', '.join(known)}")


def _model_at(model: type[BaseModel], path: Path) -> type[BaseModel]:
    """The model whose keys stand at this path: a field's own, whatever lists, mappings and options surround it."""
    for step in path:
        for name, field in model.model_fields.items():
            if step == (field.alias or name):
                inner = _model_in(field.annotation)
                model = inner if inner is not None else model
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)
