"""What people choose: files of choices, checked against the manifest and committed beside it."""

from typing import Annotated, Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from tasks.columns import APPROVALS_SCHEMA
from tasks.errors import ChoicesError
from tasks.layout import APPROVAL, approval
from tasks.manifest import connect, encode_rows, list_parts, publish_results
from tasks.storage import Store, locate

MAX_BYTES = 256 * 2**20
"""Of a file of choices: about a million of them."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Choice(_Record):
    """What a person thinks of one picture. sha256: of the file that they have looked at."""

    image: str
    variant: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    choice: Literal["approved", "rejected"]
    note: Annotated[str, Field(max_length=4000)] = ""


class Choices(_Record):
    """A file of choices, as the report's page saves it. It names each picture once."""

    schema_version: Literal[1] = Field(alias="schema")
    who: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
    saved: AwareDatetime
    choices: tuple[Choice, ...]

    @model_validator(mode="after")
    def _refuse_repeats(self) -> "Choices":
        first: dict[tuple[str, str], int] = {}
        for number, choice in enumerate(self.choices, 1):
            same = first.setdefault((choice.image, choice.variant), number)
            if same != number:
                raise ValueError(f"choice {number} repeats choice {same} ({choice.image!r}, {choice.variant})")
        return self

    def rows(self) -> list[dict[str, Any]]:
        """As rows of `APPROVALS_SCHEMA`."""
        return [
            {
                "image_key": choice.image,
                "variant": choice.variant,
                "output_sha256": choice.sha256,
                "choice": choice.choice,
                "choice_note": choice.note,
                "choice_by": self.who,
                "choice_at": self.saved,
            }
            for choice in self.choices
        ]


class Refusal(NamedTuple):
    """Why one choice cannot be applied. number: its place in the file, from 1."""

    number: int
    image: str
    variant: str
    reason: str


class RefusedChoicesError(ChoicesError):
    """Choices about pictures that are not in the manifest. refusals: each with its reason."""

    def __init__(self, refusals: list[Refusal], num_choices: int) -> None:
        super().__init__(
            f"{len(refusals)} of {num_choices} choices cannot be applied, so none was: make the report anew, look at "
            "these pictures again and save the choices once more"
        )
        self.refusals = refusals


def read_choices(address: str) -> Choices:
    """The choices in a JSON file, by its path or URL. Raises ChoicesError with what is wrong and where."""
    store, name = locate(address)
    try:
        return Choices.model_validate_json(store.read(name, max_bytes=MAX_BYTES))
    except FileNotFoundError as error:
        raise ChoicesError(f"there is no file of choices at {address!r}") from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ChoicesError(f"choices {address!r}: {'; '.join(problems[:5])}{more}") from error


def apply_choices(output: Store, choices: Choices) -> int:
    """Commit those choices that are not there yet, publish the results; how many there were.

    All are kept, and the one saved last counts. Raises RefusedChoicesError, and commits nothing, if one of them is
    about an image, a variant or a file that is not in the manifest.
    """
    rows = choices.rows()
    table = pa.Table.from_pylist(rows, schema=APPROVALS_SCHEMA).append_column("number", pa.array(range(len(rows))))
    while True:
        parts = list_parts(output)
        connection = connect(output, parts, views=["latest", "approvals"])
        connection.register("asked", table)
        if refusals := [Refusal(number + 1, *rest) for number, *rest in connection.execute(_REFUSED).fetchall()]:
            raise RefusedChoicesError(refusals, len(rows))
        columns = ", ".join(APPROVALS_SCHEMA.names)
        new = connection.execute(f"select number from asked anti join approvals using ({columns}) order by number")
        numbers = [number for (number,) in new.fetchall()]
        if not numbers or _commit(output, parts.approvals, [rows[number] for number in numbers]):
            publish_results(output)
            return len(numbers)


_REFUSED = """
    select number, asked.image_key, asked.variant, case
        when asked.image_key not in (select image_key from latest) then 'the manifest has no such image'
        when status is null then 'the manifest has no such variant of this image'
        when status <> 'ok' then 'it has no picture, its status is ' || status
        else 'its picture was changed since: its SHA-256 is now ' || coalesce(latest.output_sha256, 'unknown') end
    from asked left join latest using (image_key, variant)
    where latest.output_sha256 is distinct from asked.output_sha256 or status <> 'ok' order by number
"""


def _commit(output: Store, before: tuple[str, ...], rows: list[dict[str, Any]]) -> bool:
    """Write the file after those of `before`; False if somebody else was faster."""
    match = APPROVAL.fullmatch(before[-1]) if before else None
    number = int(match.group(1)) + 1 if match else 1
    return output.create(approval(number), encode_rows(rows, APPROVALS_SCHEMA))
