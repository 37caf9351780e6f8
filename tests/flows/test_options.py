"""One definition of the options, and everything that is derived from it."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flows.cli import app
from flows.cli.options import configured, flags_of
from flows.cli.options_table import table
from flows.colorize_archive import colorize_archive
from flows.recolor_archive import recolor_archive
from tasks.options import (
    AfterwardsOptions,
    MachineOptions,
    RecolorOptions,
    ResumeOptions,
    RunOptions,
    flow_arguments,
    groups,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Without the machine's own file and variables."""
    monkeypatch.chdir(tmp_path)
    for name in RunOptions.model_fields:
        monkeypatch.delenv(f"DIFFCOLOR_{name.upper()}", raising=False)


def test_every_option_is_described_once():
    for options in (RunOptions, RecolorOptions):
        grouped = [name for _, fields in groups(options) for name in fields]
        assert grouped == list(options.model_fields), "in one group each, in one order everywhere"
    assert all(field.description for field in (RunOptions.model_fields | RecolorOptions.model_fields).values())


def test_the_table_in_the_docs_is_of_these_options():
    assert (ROOT / "docs/options.md").read_text() == table(), "run `python -m flows.cli.options_table`"


def test_the_flow_takes_what_people_give_one_by_one_and_the_rest_as_a_record():
    """The schema is what Prefect's form is made of, and what `prefect deployment run -p` is checked against."""
    schema = colorize_archive.parameters
    flat = ["archive", "output", "catalog", "prompt", "caption", "model", "preset", "limit"]
    assert list(schema.properties) == [*flat, "options"]
    assert schema.required == ["archive", "output"]
    assert schema.properties["preset"]["anyOf"][0]["enum"] == ["paper", "standard", "fast", "instant", "demo", "photo"]
    rest = schema.definitions["MoreOptions"]["properties"]
    assert [*flat, *rest] == list(RunOptions.model_fields)
    assert rest["device"]["enum"] == ["auto", "cpu", "cuda"]
    assert rest["commit_every"]["minimum"] == 1
    for name, field in RunOptions.model_fields.items():
        shown = (schema.properties if name in flat else rest)[name]
        assert " ".join(shown["description"].split()) == " ".join(field.description.split())
        assert shown.get("default") == field.get_default() if not field.is_required() else "default" not in shown

    recolor = recolor_archive.parameters
    assert list(recolor.properties) == ["output", "catalog", "options"]
    rest = recolor.definitions["MoreRecolorOptions"]["properties"]
    assert list(rest) == [*MachineOptions.model_fields, *ResumeOptions.model_fields, *AfterwardsOptions.model_fields]


def test_a_flow_gets_the_options_that_its_arguments_were_made_of():
    options = RunOptions(archive="in", output="out", limit=3, num_actors=2, overrides={"stage2.adapter_rank": 4})
    arguments = flow_arguments(options)
    assert set(arguments) == set(colorize_archive.parameters.properties)
    validated = colorize_archive.validate_parameters(arguments)
    rest = dict(validated.pop("options"))
    assert validated | rest == dict(options)


@pytest.mark.parametrize(
    "wrong",
    [{"preset": "quick"}, {"limit": 0}, {"options": {"num_actors": 0}}, {"options": {"sed": 1}}],
)
def test_a_flow_refuses_what_cannot_be(wrong):
    with pytest.raises(Exception, match=next(iter(wrong.get("options", wrong)))):
        colorize_archive.validate_parameters({"archive": "in", "output": "out"} | wrong)


def test_run_has_a_flag_for_every_option_with_its_default_and_limit():
    parameters = {p.name: p for p in typer.main.get_command(app).commands["run"].params}
    for name, field in RunOptions.model_fields.items():
        if name == "archive":
            continue
        parameter = parameters[name]
        assert [*parameter.opts, *parameter.secondary_opts] == [
            f for text in flags_of(name, field) for f in text.split("/")
        ]
        assert parameter.default == (None if field.is_required() else field.default)
        assert parameter.help.startswith(" ".join(field.description.split()))
    assert parameters["shard_size"].min == parameters["limit"].min == 1
    assert parameters["gpus_per_actor"].min == 0
    assert parameters["seed"].min is None


@pytest.mark.parametrize("name", ["preset", "image_format", "access_copy", "device", "dtype", "retry"])
def test_a_choice_is_a_choice_on_the_command_line(name):
    (flag,) = flags_of(name, RunOptions.model_fields[name])
    result = CliRunner().invoke(app, ["run", "in", "out", flag, "sideways"], env={"NO_COLOR": "1", "COLUMNS": "200"})
    assert result.exit_code == 2
    assert "'sideways' is not one of" in result.output


def test_a_variable_counts_before_the_file(monkeypatch):
    Path("diffcolor.toml").write_text(
        'model = "from/file"\nnum_actors = 2\nkeep_fits = false\nlimit = 5\n'
        "[overrides]\nstage2.adapter_rank = 4\n'stage1.enabled' = false\n"
    )
    monkeypatch.setenv("DIFFCOLOR_NUM_ACTORS", "3")
    monkeypatch.setenv("DIFFCOLOR_HOME", "no option of ours")
    assert configured() == {
        "model": "from/file",
        "num_actors": 3,
        "keep_fits": False,
        "limit": 5,
        "overrides": {"stage2.adapter_rank": 4, "stage1.enabled": False},
    }
    monkeypatch.setenv("DIFFCOLOR_OVERRIDES", json.dumps({"batch_size": 1}))
    assert configured()["overrides"]["batch_size"] == 1


def test_nothing_configured_is_nothing():
    assert configured() == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_actor = 2\n", r"diffcolor.toml: there is no option 'num_actor' \(did you mean 'num_actors'\?\)"),
        ("num_actors = 0\n", "diffcolor.toml: num_actors: .* greater than or equal to 1"),
        ('preset = "quick"\n', "diffcolor.toml: preset: .*'paper', 'standard', .*'demo' or 'photo'"),
        ("num_actors 2\n", "diffcolor.toml"),
    ],
)
def test_a_wrong_file_is_refused(text, message):
    Path("diffcolor.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        configured()


def test_a_wrong_variable_is_refused_by_its_name(monkeypatch):
    monkeypatch.setenv("DIFFCOLOR_SHARD_SIZE", "many")
    with pytest.raises(ValueError, match="^DIFFCOLOR_SHARD_SIZE: .*integer"):
        configured()
