"""docs/options.md, made of the fields in tasks/options.py: `python -m flows.cli.options_table`."""

import json
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from flows.cli.options import FILE, PREFIX, flags_of, type_of
from tasks.options import RunOptions, groups, in_one_line

HEAD = f"""# Options of a run

<!-- Made by `python -m flows.cli.options_table` from the fields in tasks/options.py: do not edit. -->

An option has the same name everywhere: as a key of `{FILE}` in the working folder, in capitals as a variable
`{PREFIX}...`, and as a parameter of the flow `colorize-archive`. A flag of `diffcolor run` counts before a variable, a
variable before the file, and the file before the default.

Deployments see flow parameters only. The options of the first group are parameters of their own, all others are fields
of the parameter `options`. The command `recolor` and the flow `recolor-archive` take the groups *Machines*,
*Resuming and faults* and *Afterwards*. The commands `colorize` and `study` take `model`, `preset`, `seed`, `overrides`
and `device`, `colorize` also `dtype`.

```toml
# {FILE}
model = "../models/stable-diffusion"
preset = "paper"
num_actors = 8

[overrides]
stage2.adapter_rank = 4
```
"""
KINDS = {str: "text", int: "integer", float: "number", bool: "yes or no", list[str]: "PATH=VALUE"}


def table() -> str:
    """The text of docs/options.md."""
    lines = [HEAD.rstrip()]
    for title, fields in groups(RunOptions):
        lines += ["", f"## {title}", "", "| option | flag | values | default | meaning |", "|---|---|---|---|---|"]
        lines += [
            f"| `{name}` | {_flags(name, field)} | {_values(field)} | {_default(field)} | {in_one_line(field)} |"
            for name, field in fields.items()
        ]
    return "\n".join(lines) + "\n"


def _flags(name: str, field: FieldInfo) -> str:
    flags = ", ".join(f"`{flag}`" for flag in flags_of(name, field))
    positional = {"archive": "ARCHIVE", "output": f"OUTPUT or {flags}"}
    return positional.get(name, flags)


def _values(field: FieldInfo) -> str:
    annotation, minimum = type_of(field)
    if annotation in KINDS:
        return KINDS[annotation] + ("" if minimum is None else f", at least {minimum:g}")
    return ", ".join(f"`{choice}`" for choice in get_args(annotation))


def _default(field: FieldInfo) -> str:
    default: Any = field.default
    if field.is_required():
        return "required"
    return "–" if default is None else f"`{default if isinstance(default, str) else json.dumps(default)}`"


if __name__ == "__main__":
    Path("docs/options.md").write_text(table(), encoding="utf-8")
