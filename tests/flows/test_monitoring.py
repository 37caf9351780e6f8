"""What Prefect's server is told of runs: names and artifacts, read back from its API."""

import json
import logging
import re
import shlex
import threading
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, strategies as st
from markdown_it import MarkdownIt
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from typer.testing import CliRunner

from diffcolor_core.config import preset
from flows import monitoring
from flows.cli import app
from flows.colorize_archive import colorize_archive
from flows.monitoring import Watched, watched, without_secrets
from flows.recolor_archive import recolor_archive
from tasks.metrics import RunMetrics
from tasks.options import RunOptions
from tasks.progress import MAX_LISTED, RunProgress
from tasks.records import RunConfig


def run_of(state: Any) -> UUID:
    return UUID(str(state.state_details.flow_run_id))


def artifacts_of(flow_run_id: UUID) -> dict[str, Any]:
    """Its artifacts by key, less the result that Prefect keeps of a flow run itself."""
    with get_client(sync_client=True) as client:
        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        found = [artifact for artifact in client.read_artifacts(artifact_filter=of_run) if artifact.key]
    assert len({artifact.key for artifact in found}) == len(found), "each is made once"
    return {artifact.key: artifact for artifact in found}


def a_config(output: Path, **options: Any) -> RunConfig:
    return RunConfig(
        options=RunOptions(archive="/in", output=str(output), **options),
        run_id="it's a run",
        model_id="demo",
        model_revision="1",
        settings=preset("demo"),
    )


def a_row(number: int, status: str, message: str = "not a picture") -> dict[str, Any]:
    return {"image_key": f"{number}.png", "status": status, "error_class": "UnreadableImageError"} | {
        "error_message": message
    }


@pytest.mark.usefixtures("without_actors")
def test_the_pages_of_a_run(small_archive, tiny_folder, tmp_path):
    evil = "<script>alert(1)<|script> [x](http:|evil) `|`.jpg".replace("/", "|")
    (small_archive / evil).write_bytes(b"no picture")
    output = tmp_path / "it's out"
    options = {"report": False, "run_id": "it's"}
    state = colorize_archive(
        str(small_archive), str(output), model=str(tiny_folder), options=options, return_state=True
    )
    assert state.result()["quarantined"] == 2
    with get_client(sync_client=True) as client:
        assert re.fullmatch(r"archive, \d{4}-\d\d-\d\d \d\d:\d\d UTC", client.read_flow_run(run_of(state)).name)
    artifacts = artifacts_of(run_of(state))
    assert set(artifacts) == {"diffcolor-progress", "diffcolor-quarantined", "diffcolor-summary"}

    progress = artifacts["diffcolor-progress"]
    assert (progress.type, progress.data) == ("progress", 100)
    assert re.match(r"5 of 5 images, 0 failed, 2 quarantined, [\d.]+ images/min, 0 s left", progress.description)

    table = artifacts["diffcolor-quarantined"]
    assert table.type == "table"
    assert {row["image"]: row["error"] for row in json.loads(table.data)} == {
        "`broken.jpg`": "UnreadableImageError",
        f"`` {evil} ``": "UnreadableImageError",
    }
    assert "more**" not in table.description
    (command,) = re.findall(r"^diffcolor query .*$", table.description, re.MULTILINE)
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--format", "jsonl"])
    assert {json.loads(line)["image_key"] for line in result.stdout.splitlines()} == {"broken.jpg", evil}

    summary = artifacts["diffcolor-summary"].data
    assert artifacts["diffcolor-summary"].type == "markdown"
    assert "state:   finished, with quarantined or failed images\n" in summary
    assert f"archive: {small_archive}\noutput:  {output}\nimages:  5 of 5 images, 0 failed, 2 quarantined" in summary
    assert "| ok | 4 |\n| quarantined | 2 |\n| failed | 0 |\n| done before | 0 |" in summary
    assert "| `UnreadableImageError` | 2 |" in summary
    assert "report:" not in summary, "there is none"
    assert evil not in summary

    # the same again, now with a report: nothing to do
    (output / "report").mkdir()
    (output / "report" / "index.html").write_text("a report")
    state = colorize_archive(
        str(small_archive), str(output), model=str(tiny_folder), options={"report": False}, return_state=True
    )
    artifacts = artifacts_of(run_of(state))
    assert set(artifacts) == {"diffcolor-summary"}
    assert f"report:  {output}/report/index.html\n" in artifacts["diffcolor-summary"].data
    assert "| done before | 6 |" in artifacts["diffcolor-summary"].data

    # a recolor run is named after the output
    targets = tmp_path / "targets.csv"
    targets.write_text("image,target_prompt\nscan 1.png,a purple box on a yellow table\n")
    state = recolor_archive(str(output), str(targets), return_state=True)
    assert artifacts_of(run_of(state))["diffcolor-progress"].data == 100
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run_of(state)).name.startswith("it's out, ")


def test_artifacts_stay_small_whatever_the_archive(tmp_path):
    long = "`|<b>\n" * 400
    config = a_config(tmp_path)

    @flow
    def many() -> None:
        with watched(config) as run:
            logger = logging.getLogger("nobody")
            logger.disabled = True
            with run.showing(RunProgress(20_000, logger, RunMetrics(config.run_id, 20_000))) as progress:
                for number in range(19_999):
                    progress.image_done([a_row(number, "quarantined", long)])

    artifacts = artifacts_of(run_of(many(return_state=True)))
    table = artifacts["diffcolor-quarantined"]
    assert len(json.loads(table.data)) == MAX_LISTED == 100
    assert "first 100, and there are **19,899 more**" in table.description
    assert "and run_id = 'it''s a run'\"" in table.description
    assert len(table.data) < 50_000
    assert artifacts["diffcolor-progress"].data == pytest.approx(99.995)
    assert len(artifacts["diffcolor-summary"].data) < 3_000


def test_the_progress_artifact_is_updated_at_a_bounded_rate(tmp_path, monkeypatch):
    calls = []
    seen = threading.Event()

    def update(artifact_id: UUID, percent: float, words: str) -> None:
        calls.append(percent)
        seen.set()

    monkeypatch.setattr(monitoring, "update_progress_artifact", update)
    monkeypatch.setattr(monitoring, "UPDATE_SECONDS", 0.5)
    config = a_config(tmp_path)

    @flow
    def quick() -> None:
        run = Watched(config)
        with run.showing(RunProgress(1000, logging.getLogger("nobody"), RunMetrics("quick", 1000))) as progress:
            for number in range(400):
                progress.image_done([a_row(number, "failed")])
            assert seen.wait(30)
            for number in range(600):
                progress.image_done([a_row(number, "failed")])

    quick()
    assert 0 < calls[0] < 100
    assert calls[-1] == 100
    assert len(calls) <= 3, "one while it ran, perhaps one more, one at the end"


@pytest.mark.parametrize(
    ("error", "told"),
    [(OSError("disk\n```\n# full"), "failed: OSError: disk"), (KeyboardInterrupt(), "stopped; finished images")],
)
def test_the_summary_says_how_a_run_ended(tmp_path, error, told):
    ids = []

    @flow
    def ends() -> None:
        from prefect.runtime import flow_run

        ids.append(UUID(flow_run.id))
        with watched(a_config(tmp_path)):
            raise error

    with pytest.raises(type(error)):
        ends()
    (summary,) = artifacts_of(ids[0]).values()
    assert f"state:   {told}" in summary.data
    assert len(re.findall("^```", summary.data, re.MULTILINE)) == 4, "the message ends no block of code"


@given(st.text(min_size=1, max_size=40) | st.text("`[]()!<>*_ ax/:&|\\", min_size=1, max_size=12))
def test_a_name_is_no_markup_in_a_table(name):
    """Prefect's pages read cells as Markdown: without this, `![x](http://...)` would fetch a picture."""
    text = monitoring.shortened(name)
    (paragraph,) = [token for token in MarkdownIt().parse(monitoring._as_code_span(text)) if token.type == "inline"]
    (code,) = paragraph.children
    assert code.type == "code_inline"
    assert code.content.strip(" ") == text.strip(" ")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("/scans/a#b?c@d", "/scans/a#b?c@d"),
        ("s3://museum/a@b", "s3://museum/a@b"),
        ("https://me:p@ss@host/scans?token=1#2", "https://host/scans"),
        ("zip://recto::s3://me:word@museum/box.zip?versionId=1", "zip://recto::s3://museum/box.zip"),
    ],
)
def test_an_address_is_shown_without_secrets(address, told):
    assert without_secrets(address) == told
