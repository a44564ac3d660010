"""The command line before Hydra reads it: order of flags, `~`, characters, and how to quote."""

from __future__ import annotations

import locale
import os
import shlex
import sys
from argparse import Action, ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from vitrim.errors import ConfigError

PATHS = ("out", "from_run", "data.root", "model.checkpoint", "teacher.checkpoint")
"""Keys whose values are paths, in which `~` is the home folder."""
_FOLDERS = ("config_dir", "config_path")


def use_utf8(command: str) -> None:
    """Start this command again in Python's UTF-8 mode, where the locale has another encoding.

    Names of files, and texts in them, could not be read or written otherwise.

    Args:
        command: the module whose `main` it is.
    """
    encoding = locale.getpreferredencoding(do_setlocale=False).lower().replace("-", "")
    if sys.flags.utf8_mode or encoding == "utf8":
        return
    code = f"import sys; from {command} import main; sys.argv[0] = {sys.argv[0]!r}; main()"
    os.environ["PYTHONUTF8"] = "1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-X", "utf8", "-c", code, *sys.argv[1:]])


def show_every_character() -> None:
    """Let output show what is no text, such as a name in another encoding, by its number."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def prepared(arguments: Sequence[str]) -> list[str]:
    """Return the arguments as Hydra needs them: flags first, and paths without `~`.

    Raises:
        ConfigError: a flag that runs code, or an argument that is no text.
    """
    from hydra._internal.utils import get_args_parser

    for word in arguments:
        _check_text(word)
    known = get_args_parser()
    flags: list[str] = []
    words: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            words += rest
            break
        action = _action(known, word)
        if action is None:
            (flags if _is_flag(word) else words).append(word)
            continue
        if action.dest == "experimental_rerun":
            raise ConfigError(
                f"{word}: --experimental-rerun reads a pickle, which can run code: repeat the "
                "command of the run instead"
            )
        flags.append(_at_home(word) if action.dest in _FOLDERS else word)
        takes = action.nargs is None or (action.nargs == "?" and rest[:1] and _fits(action, rest))
        if takes and "=" not in word and rest:
            value = rest.pop(0)
            flags.append(at_home(value) if action.dest in _FOLDERS else value)
    return [*flags, *map(_path, words)]


def _check_text(word: str) -> None:
    try:
        word.encode()
    except UnicodeEncodeError:
        shown = word.encode(errors="backslashreplace").decode()
        raise ConfigError(f"{shown}: not UTF-8: rename the file or folder") from None
    if "\0" in word or "\n" in word.partition("=")[0]:
        raise ConfigError(f"{word!r}: expected text in one line, without NUL")


def _is_flag(word: str) -> bool:
    return word.startswith("-") and "=" not in word


def _action(known: ArgumentParser, word: str) -> Action | None:
    """Return the flag that `word` is, or abbreviates; None if it is none, or several."""
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return None
    options = known._option_string_actions
    if name in options:
        return options[name]
    long = name.startswith("--") and len(name) > 2
    near = {id(one): one for text, one in options.items() if long and text.startswith(name)}
    return next(iter(near.values())) if len(near) == 1 else None


def _fits(action: Action, rest: Sequence[str]) -> bool:
    """Whether the next word is the value of a flag that may have one."""
    return action.choices is not None and rest[0] in action.choices


def _at_home(word: str) -> str:
    flag, equals, value = word.partition("=")
    return f"{flag}{equals}{at_home(value)}"


def _path(word: str) -> str:
    """Return `word` with the home folder for `~`, if its key is that of a path."""
    return _at_home(word) if word.partition("=")[0].lstrip("+") in PATHS else word


def at_home(path: str) -> str:
    """Return a path with the home folder for `~`."""
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:  # no such user
        return path


def folder_name(path: str) -> Path:
    """Return the folder that a command's argument names, for argparse.

    Raises:
        ArgumentTypeError: it is no name of a folder.
    """
    if not path or "\0" in path:
        raise ArgumentTypeError(f"{path!r}: expected the name of a folder")
    return Path(at_home(path))


def add_plugins(parser: ArgumentParser) -> None:
    """Let a command that composes nothing name packages of others, in `--plugins`."""
    parser.add_argument(
        "--plugins",
        type=lambda text: text.split(","),
        default=[],
        metavar="PACKAGE,...",
        help="packages to import first, such as one that registers the run's network with timm",
    )


def import_plugins(names: Sequence[str]) -> None:
    """Import the packages that `--plugins` names.

    Raises:
        ConfigError: there is no such package, or it cannot be imported.
    """
    if names:
        from vitrim.cli import plugins

        plugins.use(names, Path.cwd())


def count_of(text: str) -> int:
    """Return the whole number of a command's flag, for argparse.

    Raises:
        ArgumentTypeError: it is none, or below 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text}: expected a whole number from 1 on")
    return int(text)


def quoted(word: str) -> str:
    """Return `word` as it is typed in a shell, with the quotes that Hydra needs for its value."""
    key, _, value = word.partition("=")
    escaped = value.replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')
