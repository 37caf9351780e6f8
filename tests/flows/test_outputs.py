"""`query`, `status`, `verify`: tables for people, JSON lines for programs."""

import csv
import io
import json
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from flows.cli import app, common
from tasks.manifest import commit_part
from tasks.storage import Store
from tests.tasks.test_manifest import row

RUN_ID, KEY = "20261123T002612Z", "boxes/archive of the northern railway, 1905 to 1911/" + "x" * 90 + ".tif"
ROWS = [
    row(image=KEY, run_id=RUN_ID, total_seconds=15.5, colorfulness=float("nan"), nouns=[{"noun": "ball"}]),
    row(
        image="b.png",
        run_id=RUN_ID,
        status="quarantined",
        error_class="UnreadableImageError",
        error_message="the file is empty",
    ),
]


@pytest.fixture
def output(tmp_path):
    store = Store(str(tmp_path / "out"))
    commit_part(store, "p", ROWS)
    return store.url


def ask(*arguments, code=0, terminal=False):
    """stdout of a command on a terminal of 120 columns, or in a pipe."""
    with patch.object(common.console, "_force_terminal", terminal), patch.object(common.console, "_width", 120):
        result = CliRunner().invoke(app, list(arguments), env={"NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    return result.stdout


def test_a_run_is_one_line_of_status_with_its_times_whole(output):
    lines = ask("status", output, terminal=True).splitlines()
    (line,) = [line for line in lines if RUN_ID in line and " ok " in line]
    assert line.count("2026-11-22 12:00:00") == 2
    assert "15.5" in line
    assert max(map(len, lines)) <= 120


def test_a_long_key_is_folded_and_not_cut_off(output):
    text = ask("query", output, "select image_key, started_at, run_id from results", terminal=True)
    assert "…" not in text
    cells = [line.split("│")[1].strip() for line in text.splitlines() if "│" in line]
    assert KEY.replace(" ", "") in "".join(cells).replace(" ", "")
    assert "2026-11-22 12:00:00+00:00" in text


def test_a_pipe_gets_json_lines(output):
    sql = "select image_key, started_at, colorfulness, nouns from results order by image_key desc"
    first, second = map(json.loads, ask("query", output, sql).splitlines())
    assert second["image_key"] == "b.png"
    assert first["started_at"] == "2026-11-22T12:00:00+00:00"
    assert first["colorfulness"] is None  # JSON has no NaN
    assert first["nouns"][0]["noun"] == "ball"
    kinds = [json.loads(line)["about"] for line in ask("status", output).splitlines()]
    assert kinds == ["run", "run", "error"]


def test_findings_are_json_lines_and_the_summary_goes_to_the_other_stream(output):
    Store(output).write("letter.txt", b"")
    (finding,) = map(json.loads, ask("verify", output, code=3).splitlines())
    assert (finding["finding"], finding["file"]) == ("extra", "letter.txt")
    Store(output).delete("letter.txt")
    assert ask("verify", output) == ""


@pytest.mark.parametrize("format", ["table", "jsonl", "json", "csv"])
def test_a_format_that_is_asked_for_is_given(output, format):
    text = ask("query", output, "select image_key from results order by 1", "--format", format, terminal=True)
    read = {
        "table": lambda: [line.strip("│ ") for line in text.splitlines() if ".png" in line],
        "jsonl": lambda: [json.loads(line)["image_key"] for line in text.splitlines()][:1],
        "json": lambda: [record["image_key"] for record in json.loads(text)][:1],
        "csv": lambda: [record["image_key"] for record in csv.DictReader(io.StringIO(text))][:1],
    }
    assert read[format]() == ["b.png"]


def test_describe_tells_units_and_meaning(output):
    lines = [json.loads(line) for line in ask("query", output, "describe results").splitlines()]
    (width,) = [line for line in lines if line["column"] == "width_px"]
    assert width == {"column": "width_px", "type": "INTEGER", "unit": "px", "description": "Upright width.", "since": 1}


def test_choices_that_are_refused_are_told_one_by_one(output, tmp_path):
    choice = {"image": "b.png", "variant": "v", "sha256": "0" * 64, "choice": "approved"}
    record = {"schema": 1, "who": "Ada", "saved": "2026-11-25T12:00:00Z", "choices": [choice]}
    (tmp_path / "choices.json").write_text(json.dumps(record))
    (refused,) = map(json.loads, ask("approve", output, str(tmp_path / "choices.json"), code=2).splitlines())
    assert (refused["choice"], refused["image"], refused["variant"]) == (1, "b.png", "v")
    assert refused["refused_because"] == "it has no picture, its status is quarantined"
    assert Store(output).list("approvals") == []


def test_an_export_that_cannot_be_made_is_wrong_usage(output, tmp_path):
    ask("export", output, str(tmp_path / "d"), "--where", "nonsense", code=2)
    ask("export", output, "memory://bag", "--bag", code=2)
    assert ask("export", output, str(tmp_path / "d"), "--approved").startswith("no picture matches")
    assert not (tmp_path / "d").exists()
