"""YAML that means one thing: a key stands once, and a text is the text that was written.

PyYAML keeps the last of two equal keys without a word, reads `007` and `yes` as no text, 010 as
eight, 1:30 as ninety, and lets a small file stand for billions of values (aliases of aliases).
`read` refuses what is double or endless, and gives texts as they stand.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

MOST_CHARACTERS = 2**20
MOST_VALUES = 50_000  # with aliases written out
NULL, MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"
OLD_NUMBER = re.compile(r"[-+]?(0[\d_]+|[\d_]+(:[\d_]+)+(\.\d*)?)")  # in base 8 or 60
Path = tuple[str, ...]


class YamlError(ValueError):
    """The message says what is wrong, with lines counted from 1."""


@dataclass
class Document:
    """A file's content, and the line of every key in it."""

    content: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def line_of(self, path: Path) -> int:
        """Return the line of the deepest part of `path` that is in the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read(text: str, is_text: Callable[[Path], bool] = lambda path: False) -> Document:
    """The one document of `text`.

    Args:
        is_text: whether the value under these keys is a text; there `007`, `1e3` and `yes` are
            texts as they stand. Nothing, `~` and `null` without quotation marks stay None.

    Raises:
        YamlError
    """
    if len(text) > MOST_CHARACTERS:
        raise YamlError(f"{len(text)} characters, more than {MOST_CHARACTERS}")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(None)
        _check_size(node, {}, ())
        reader = _Reader(loader, is_text)
        return Document(reader.value(node, ()), reader.lines)
    except yaml.YAMLError as error:
        raise YamlError(str(error)) from None
    except RecursionError:
        raise YamlError("values within values, hundreds of levels deep") from None


def _check_size(node: yaml.Node, sizes: dict[int, int], inside: tuple[int, ...]) -> int:
    """Count the values of the node, with aliases written out, and refuse too many."""
    if id(node) in inside:
        raise YamlError(f"line {_line(node)}: a value that holds itself")
    if id(node) not in sizes:
        inner = (*inside, id(node))
        sizes[id(node)] = 1 + sum(_check_size(part, sizes, inner) for part in _parts(node))
    if sizes[id(node)] > MOST_VALUES:
        raise YamlError(f"line {_line(node)}: more than {MOST_VALUES} values, with aliases")
    return sizes[id(node)]


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


@dataclass
class _Key:
    value: Any
    text: str
    line: int
    node: yaml.Node  # of what stands behind it
    merges: bool  # <<, which takes over the keys of another mapping


class _Reader:
    def __init__(self, loader: yaml.SafeLoader, is_text: Callable[[Path], bool]) -> None:
        self._loader, self._is_text = loader, is_text
        self.lines: dict[Path, int] = {}

    def value(self, node: yaml.Node, path: Path) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return {key.value: self._entry(key, path) for key in self._keys(node, path)}
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            return [self._item(part, path, at) for at, part in enumerate(node.value)]
        as_it_stands = isinstance(node, yaml.ScalarNode) and node.tag != NULL
        if as_it_stands and self._is_text(path):
            return node.value
        return self._constructed(node)

    def _constructed(self, node: yaml.Node) -> Any:
        """Numbers that others read in base 10 stay texts: a check of numbers takes 010 for ten."""
        number = isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float"))
        if number and OLD_NUMBER.fullmatch(str(node.value)):
            return node.value
        try:
            return self._loader.construct_object(node, deep=True)
        except (ValueError, OverflowError, TypeError) as error:  # 2024-13-45 is no day
            raise YamlError(f"line {_line(node)}: {error}") from None

    def _entry(self, key: _Key, path: Path) -> Any:
        path = (*path, key.text)
        self.lines.setdefault(path, key.line)
        return self.value(key.node, path)

    def _item(self, node: yaml.Node, path: Path, at: int) -> Any:
        path = (*path, str(at))
        self.lines.setdefault(path, _line(node))
        return self.value(node, path)

    def _keys(self, node: yaml.MappingNode, path: Path) -> list[_Key]:
        """A mapping's own keys, and those of the mappings that it merges where it has no own."""
        own: list[_Key] = []
        merged: list[_Key] = []
        seen: dict[Any, _Key] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, value_node)
            _check_once(key, seen, path)
            own.append(key)
            if key.merges:
                merged = self._merged(value_node, path)
        own = [key for key in own if not key.merges]
        taken = {key.value for key in own}
        return [key for key in merged if key.value not in taken] + own

    def _key(self, key_node: yaml.Node, value_node: yaml.Node) -> _Key:
        if not isinstance(key_node, yaml.ScalarNode):
            raise YamlError(f"line {_line(key_node)}: a key that is a list or a mapping")
        merges = key_node.tag == MERGE
        value = None if merges else self._constructed(key_node)
        return _Key(value, str(key_node.value), _line(key_node), value_node, merges)

    def _merged(self, node: yaml.Node, path: Path) -> list[_Key]:
        """The keys behind `<<`, of one mapping or a list of them."""
        found: list[_Key] = []
        seen: dict[Any, _Key] = {}
        for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(part, yaml.MappingNode):
                raise YamlError(f"line {_line(part)}: << needs a mapping, or a list of mappings")
            for key in self._keys(part, path):
                _check_once(key, seen, path)
                found.append(key)
        return found


def _check_once(key: _Key, seen: dict[Any, _Key], path: Path) -> None:
    """YAML's `1` and `"1"`, `yes` and `on` are one key here as well: they are one to a reader, or
    to YAML. `seen` takes the key up by its text and by its value.
    """
    by_text, by_value = ("text", key.text), ("value", key.merges, key.value)
    other = seen.get(by_text) or seen.get(by_value)
    if other is not None:
        same_text = other.text == key.text
        names = [key.text] if same_text else [other.text, key.text]
        name = " and ".join(".".join((*path, name)) for name in names)
        raise YamlError(
            f"{name!r} stands twice, in line {other.line} and in line {key.line}"
            + ("" if same_text else "; YAML takes them for one key")
        )
    seen[by_text] = seen[by_value] = key
