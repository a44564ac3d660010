"""Interpolations that a configuration may contain, and its size once they are resolved."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vitrim.errors import ConfigError
from vitrim.files import check_yaml

OF_SLURM = ("gpus_per_node", "tasks_per_node")
RESOLVERS = ("oc.select", "oc.create", *OF_SLURM, "hydra", "now", "python_version")
"""Resolvers that an interpolation may call."""
MAX_VALUES = 2**17
"""Values, and 32 characters of text each, that a configuration may have when it is resolved."""
CHARACTERS = 32
MAX_NUMBER = 2**256
_MAX_DEPTH = 100
_ESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)\\\$\{")
_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_KEY = re.compile(r"\.*[\w-][\w\-/@.\[\]]*")
_LITERAL = re.compile(r"\$\{oc\.create:'([^'$\\]*)'\}")
_PLACE = "\0"
"""What stands for an interpolation within another one."""
_WORDS = re.compile(rf"({_PLACE}|[\w\s,-])*")

Path = tuple[str | int, ...]


def references(text: str) -> list[str]:
    """Return the keys that the interpolations in `text` refer to.

    Raises:
        ConfigError: an interpolation whose key is computed, or that calls another resolver than
            those of `RESOLVERS`: it could read the environment, or be of any size.
    """
    literal = _LITERAL.fullmatch(text)
    if literal is not None:
        check_yaml(literal[1].encode())
        return []
    keys: list[str] = []

    def reference(match: re.Match[str]) -> str:
        keys.extend(_keys(match[1].strip()))
        return _PLACE

    rest, previous = _ESCAPED.sub(r"\1", text), ""
    while rest != previous:
        previous, rest = rest, _INNERMOST.sub(reference, rest)
    if "${" in rest:
        raise ConfigError("only interpolations of keys, such as ${model.name}, are allowed")
    return keys


def _keys(content: str) -> list[str]:
    """Return the keys that one interpolation reads, which contains no other one."""
    name, colon, arguments = content.partition(":")
    if not colon and _KEY.fullmatch(content):
        return [content]
    first = arguments.partition(",")[0].strip()
    match name.strip():
        case "oc.select" if colon and _KEY.fullmatch(first):
            return [first]
        case "hydra" if _KEY.fullmatch(arguments):
            return [f"hydra.{arguments}"]
        case function if function in OF_SLURM and _WORDS.fullmatch(arguments):
            return []
        case "now" if re.fullmatch(r"[%A-Za-z_:./ -]{1,40}", arguments):
            return []
        case "python_version" if re.fullmatch(r"\w*", arguments):
            return []
    if name.strip() in ("oc.env", "env", "oc.decode"):
        raise ConfigError("the environment is not read: on the command line, the shell's $NAME is")
    raise ConfigError("only interpolations of keys, such as ${model.name}, are allowed")


def check_size(root: dict[str, object]) -> None:
    """Refuse a configuration that is too large, or endless, once its interpolations are resolved.

    Args:
        root: the configuration as plain data, its interpolations not resolved.

    Raises:
        ConfigError: naming the key.
    """
    _Sizes(root).of(())


class _Sizes:
    """Sizes of the nodes of a configuration, each computed once."""

    def __init__(self, root: dict[str, object]) -> None:
        self.root = root
        self.known: dict[Path, int] = {}
        self.open: set[Path] = set()

    def of(self, path: Path) -> int:
        """Return how many values the node at `path` has, with everything that it refers to."""
        if path in self.known:
            return self.known[path]
        where = _dotted(path)
        if path in self.open:
            raise ConfigError(f"{where}: refers to itself")
        if len(self.open) > _MAX_DEPTH:
            raise ConfigError(f"{where}: expected at most {_MAX_DEPTH} levels of references")
        self.open.add(path)
        size = 1 + sum(map(self.of, self._parts(path)))
        node = self._at(path)
        size += len(node) // CHARACTERS if isinstance(node, str) else 0
        if type(node) is int and abs(node) > MAX_NUMBER:
            raise ConfigError(f"{where}: an integer of {node.bit_length():,} bits is no value")
        if size > MAX_VALUES:
            raise ConfigError(f"{where}: more than {MAX_VALUES:,} values with all it refers to")
        self.open.remove(path)
        self.known[path] = size
        return size

    def _parts(self, path: Path) -> list[Path]:
        """Return the nodes that the one at `path` contains or refers to."""
        match self._at(path):
            case dict() as node:
                return [(*path, key) for key in node]
            case list() as node:
                return [(*path, index) for index in range(len(node))]
            case str() as node if "${" in node:
                try:
                    keys = references(node)
                except ConfigError as error:
                    raise ConfigError(f"{_dotted(path)}={_short(node)}: {error}") from None
                return [target for key in keys if (target := self._target(path, key))]
        return []

    def _target(self, path: Path, key: str) -> Path | None:
        """Return the node that `key`, used at `path`, refers to; None if there is none.

        Where the way leads through another interpolation, it is that one.
        """
        names = re.split(r"[.\[\]]+", key.lstrip(".").rstrip("]"))
        levels = len(key) - len(key.lstrip("."))
        target: Path = path[:-levels] if levels else ()
        for name in names:
            node = self._at(target)
            if isinstance(node, str) and "${" in node:
                return target
            step = self._step(node, name)
            if step is None:
                return None
            target = (*target, step)
        return target

    @staticmethod
    def _step(node: object, name: str) -> str | int | None:
        if isinstance(node, dict):
            return next((key for key in node if str(key) == name), None)
        if isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            return int(name)
        return None

    def _at(self, path: Path) -> object:
        node: object = self.root
        for step in path:
            node = node[step]  # type: ignore[index]
        return node


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path)) or "the configuration"


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
