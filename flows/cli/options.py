"""The options of `tasks.options` on the command line: flags, `diffcolor.toml` and DIFFCOLOR_* variables.

A flag counts before a variable, a variable before the file, the file before the default.
"""

import difflib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from annotated_types import Ge
from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo

from tasks.options import RunOptions, annotation_of, groups, in_one_line

T = TypeVar("T", bound=BaseModel)
FILE = "diffcolor.toml"
PREFIX = "DIFFCOLOR_"
FLAGS = {
    "output": ("-o", "--output"),
    "overrides": ("--set",),
    "image_format": ("--format",),
    "image_timeout_seconds": ("--image-timeout",),
}
"""Flags that are not simply the option's name."""
FRONT = ("What to colorize", "What to recolor")
"""Groups whose flags are in the first panel of `--help`."""


def flags_of(name: str, field: FieldInfo) -> tuple[str, ...]:
    """The flags of an option, such as ("--keep-fits/--no-keep-fits",)."""
    flag = f"--{name.replace('_', '-')}"
    return FLAGS.get(name) or ((f"{flag}/--no-{flag[2:]}" if type_of(field)[0] is bool else flag),)


def flag(name: str, *, of: type[BaseModel] = RunOptions, panel: str | None = None) -> Any:
    """An option as Typer has it, for `Annotated[str, flag("model")]`: its flags, help text and limits."""
    field = of.model_fields[name]
    _, minimum = type_of(field)
    metavar = "PATH=VALUE" if name == "overrides" else None
    more = " Repeatable." if name == "overrides" else ""
    return typer.Option(
        *flags_of(name, field),
        help=in_one_line(field) + more,
        min=minimum,
        metavar=metavar,
        rich_help_panel=panel,
    )


def type_of(field: FieldInfo) -> tuple[Any, float | None]:
    """The type of an option, without None and limits, and its minimum. Overrides are a list of assignments."""
    annotation: Any = field.annotation
    metadata = list(field.metadata)
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        metadata += [limit for part in inner for limit in part.metadata]
    if get_origin(annotation) is dict:
        annotation = list[str]
    minimum: Any = next((limit.ge for limit in metadata if isinstance(limit, Ge)), None)
    return annotation, minimum


def with_flags(options: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each option that it does not declare itself; they come as its `**flags`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = []
        for title, fields in groups(options):
            for name, field in fields.items():
                if name in {p.name for p in own}:
                    continue
                annotation, _ = type_of(field)
                if not field.is_required() and field.default is None:
                    annotation = annotation | None
                option = flag(name, of=options, panel=None if title in FRONT else title)
                default = inspect.Parameter.empty if field.is_required() else field.default
                kind = inspect.Parameter.KEYWORD_ONLY
                added.append(inspect.Parameter(name, kind, annotation=Annotated[annotation, option], default=default))

        @wraps(function)
        def command(*arguments: Any, **given: Any) -> None:
            function(*arguments, **given)

        signature = inspect.Signature([*own, *added])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return command

    return decorate


def checked(options: type[T], **given: Any) -> T:
    """The options record of what a command was given. Raises ValueError with what is wrong, in words."""
    given["overrides"] = overrides_of(given.get("overrides")) or None
    try:
        return options.model_validate({name: given[name] for name in options.model_fields if name in given})
    except ValidationError as error:
        raise ValueError("; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())) from error


def overrides_of(assignments: list[str] | None) -> dict[str, Any]:
    """`--set` as a dictionary. A value is JSON (4, 0.5, true, null, [1.0, 1.2]), or else a word.

    Raises ValueError for one without "=".
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments or ():
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r}: write it as PATH=VALUE, e.g. stage2.adapter_rank=4")
        try:
            overrides[path] = json.loads(text)
        except ValueError:
            overrides[path] = text
    return overrides


# ------------------------------------------------------------------ the file and the environment


def defaults_of(command: str, parameters: list[str]) -> dict[str, Any]:
    """What file and environment give for the parameters of a command, in place of their defaults.

    `run` takes all of it. The other commands take everything but what is said of one archive. Raises ValueError.
    """
    found = configured()
    if command != "run":
        found = {name: value for name, value in found.items() if name not in ("archive", "output", "catalog", "prompt")}
    if (overrides := found.pop("overrides", None)) is not None:
        assignments = [f"{path}={json.dumps(value)}" for path, value in overrides.items()]
        found |= dict.fromkeys(("overrides", "set_"), assignments)
    return {name: value for name, value in found.items() if name in parameters}


def configured() -> dict[str, Any]:
    """The options that `diffcolor.toml` in the working folder and DIFFCOLOR_* variables give.

    Raises ValueError for an unknown key of the file, with the nearest one, and for a value that cannot be.
    """
    if not Path(FILE).exists() and not any(f"{PREFIX}{name}".upper() in os.environ for name in RunOptions.model_fields):
        return {}
    from pydantic_settings import BaseSettings, SettingsConfigDict, TomlConfigSettingsSource

    class FromFileAndEnvironment(BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix=PREFIX, env_ignore_empty=True, toml_file=FILE, extra="forbid", validate_default=False
        )

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], init_settings: Any, env_settings: Any, *_: Any, **__: Any
        ) -> tuple[Any, ...]:
            return env_settings, TomlConfigSettingsSource(settings_cls)

    fields: dict[str, Any] = {name: (annotation_of(field), None) for name, field in RunOptions.model_fields.items()}
    try:
        found = create_model("Configured", __base__=FromFileAndEnvironment, **fields)()
    except ValidationError as error:
        raise ValueError("; ".join(_explain(problem) for problem in error.errors())) from error
    except ValueError as error:  # no TOML, or no JSON where it must be
        raise ValueError(f"{FILE} or a variable {PREFIX}*: {error}") from error
    values = found.model_dump(exclude_unset=True)
    if values.get("overrides"):
        values["overrides"] = dict(_flattened(values["overrides"]))
    return values


def _explain(problem: Mapping[str, Any]) -> str:
    name = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, RunOptions.model_fields, 1, 0)
        return f"{FILE}: there is no option {name!r} (did you mean {near[0]!r}?)"
    variable = f"{PREFIX}{name}".upper()
    return f"{variable if os.environ.get(variable) else f'{FILE}: {name}'}: {problem['msg']}"


def _flattened(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by path, from tables within tables: TOML reads `stage2.adapter_rank = 4` as such."""
    for name, value in overrides.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
