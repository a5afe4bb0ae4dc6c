"""Every verb and option as one page: `python -m direct_rlhf.commands > docs/reference/commands.md`."""

from collections.abc import Iterator
from typing import Any

import typer

from direct_rlhf.cli import app

HEAD = """# The commands

Made by `python -m direct_rlhf.commands` from `src/direct_rlhf/cli.py`; do not edit.

`RECIPE` is a file or the name of a shipped recipe (`direct-rlhf init --list`). `KEY=VALUE` overrides a key of it.

| exit code | meaning | exit code | meaning |
|---|---|---|---|
| 0 | done | 4 | out of memory at the smallest chunk |
| 1 | any other failure | 5 | diverged; the last good checkpoint is kept |
| 2 | bad configuration | 75 | interrupted; go on with `--resume` |
| 3 | bad data | | |
"""


def page() -> str:
    """The whole page, as Markdown."""
    return HEAD + "".join(_command("direct-rlhf", typer.main.get_command(app)))


def _command(name: str, command: Any) -> Iterator[str]:
    below = getattr(command, "commands", None)
    if not below:
        arguments = [param for param in command.params if param.param_type_name == "argument"]
        usage = " ".join([name, *(_argument(param) for param in arguments)])
        yield f"\n## `{usage}`\n\n{_words(command.help)}\n"
        options = [param for param in command.params if param not in arguments]
        if described := arguments + options:
            yield "\n| | |\n|---|---|\n"
            yield from (_row(param) for param in described)
    for part, verb in (below or {}).items():
        yield from _command(f"{name} {part}", verb)


def _argument(param: Any) -> str:
    words = param.metavar or param.name.upper()
    return words if param.required or words.startswith("[") else f"[{words}]"


def _row(param: Any) -> str:
    if param.param_type_name == "argument":
        return f"| `{_argument(param)}` | {_words(param.help)} |\n"
    default = "" if param.default is None or param.is_flag else f" Default: `{param.default}`."
    value = "" if param.is_flag else f" {param.metavar or param.name.strip('_').upper()}"
    return f"| `{', '.join(param.opts)}{value}` | {_words(param.help)}{default} |\n"


def _words(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
