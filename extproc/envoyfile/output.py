"""Trees to the YAML text that Envoy reads, the same bytes for the same tree."""

import hashlib
import re
from typing import Any

import yaml

from extproc.envoyfile.settings import EnvoyFileError
from extproc.envoyfile.template import Tree

# Envoy's YAML reader takes 12e4, y and 0x10 for something else than text where Python's does not: what does not
# clearly start as a word is quoted.
_CLEARLY_TEXT = re.compile(r"[A-Za-z/%@][^\n]{5,}")


class _PlainDumper(yaml.CSafeDumper):
    """Quotes whatever could be mistaken for a number or a boolean, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  the library's signature
        return True


def _represent_text(dumper: _PlainDumper, text: str) -> yaml.ScalarNode:
    style = None if _CLEARLY_TEXT.fullmatch(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_mapping(dumper: _PlainDumper, tree: dict[str, Any]) -> yaml.MappingNode:
    """Keys stay plain where Python would leave them plain: Envoy reads every key as text."""
    node = dumper.represent_mapping("tag:yaml.org,2002:map", tree.items())
    for key, _ in node.value:
        key.style = None
    return node


_PlainDumper.add_representer(str, _represent_text)
_PlainDumper.add_representer(dict, _represent_mapping)


def to_text(tree: Tree, source: str) -> str:
    """One YAML document under a line that says where it came from."""
    head = f"# Rendered by perch from {source}: an edit here is overwritten, edit that file.\n"
    return head + yaml.dump(tree, Dumper=_PlainDumper, sort_keys=False, width=120, allow_unicode=True)


def to_resources(resources: list[Tree], source: str) -> str:
    """An xDS file. Its `version_info` is a hash of the content, so that Envoy's config dump tells which one it took."""
    content = to_text({"resources": resources}, source)
    version = "v" + hashlib.sha256(content.encode()).hexdigest()[:12]
    return to_text({"version_info": version, "resources": resources}, source)


def version_of(text: str) -> str:
    """`version_info` of a rendered xDS file: what `EnvoyAdmin.filter_version` answers once Envoy has taken it."""
    found = re.search(r"^version_info: (v[0-9a-f]{12})$", text, re.MULTILINE)
    if not found:
        raise EnvoyFileError("this is no xDS file that perch rendered: it has no version_info")
    return found[1]
