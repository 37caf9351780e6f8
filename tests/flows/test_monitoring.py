"""What Prefect's server and a webhook are told of runs, read back from the server's API and from the webhook."""

import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, strategies as st
from markdown_it import MarkdownIt
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from diffcolor_core.config import preset
from flows import monitoring
from flows.cli import app
from flows.colorize_archive import colorize_archive
from flows.monitoring import Watched, watched, without_secrets
from flows.recolor_archive import recolor_archive
from support.waiting import wait_for
from support.webhook import listening
from tasks.manifest import query
from tasks.metrics import BOUNDARIES_SECONDS, EXPORTED, RunMetrics
from tasks.options import RunOptions, flow_arguments
from tasks.progress import MAX_LISTED, RunProgress
from tasks.records import RunConfig
from tasks.storage import Store

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "monitoring.md"
SECRET = "T0PSECRET"  # in the webhook's address
SECONDS = ("stage1_seconds", "stage2_seconds", "sampling_seconds")


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


# ------------------------------------------------------------------ artifacts


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


# ------------------------------------------------------------------ notifications


@pytest.fixture
def webhook() -> Iterator[list[dict[str, Any]]]:
    """What is sent to the block `custom-webhook/people`, made as the page says."""
    with listening() as (url, received):
        (documented,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
        code = documented.replace("https://hooks.example.org", url).replace("the secret part", SECRET)
        exec(code.replace('save("people")', 'save("people", overwrite=True)'), {})
        yield received


NOTIFY = {"notify": "custom-webhook/people"}


def test_a_run_that_fails_is_told_of_once(webhook, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    options = RunOptions(archive=str(tmp_path / "nowhere"), output=str(tmp_path / "out"), **NOTIFY)
    with pytest.raises(FileNotFoundError):
        colorize_archive(**flow_arguments(options))
    (told,) = webhook
    assert told["path"] == f"/{SECRET}"
    assert told["subject"] == "diffcolor: colorize-archive failed: nowhere"
    assert "there is no archive at" in told["body"]
    assert SECRET not in caplog.text


def test_too_many_quarantined_images_are_told_of_once(webhook, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)

    @flow
    def short(limits: dict[str, float]) -> None:
        config = a_config(tmp_path, **NOTIFY, **limits)
        logger = logging.getLogger("nobody")
        with watched(config) as run, run.showing(RunProgress(4, logger, RunMetrics("short", 4))) as progress:
            progress.image_done([a_row(0, "quarantined")])
            for number in (1, 2, 3):
                progress.image_done([a_row(number, "ok") | dict.fromkeys(SECONDS, 1.0) | {"fit_reused": True}])

    short({"notify_quarantined": 0.25})
    assert webhook == [], "one of four is not more than a quarter"
    state = short({}, return_state=True)
    (told,) = webhook
    assert told["subject"].startswith("diffcolor: many images quarantined: ")
    assert "1 of 4 images were quarantined, of 4 that this run has to do (1 UnreadableImageError)" in told["body"]
    assert "The limit is 10%" in told["body"]
    assert str(run_of(state)) in told["body"]
    assert SECRET not in caplog.text


def test_too_many_quarantined_images_are_told_of_while_the_run_goes_on(webhook, tmp_path, monkeypatch):
    monkeypatch.setattr(monitoring, "UPDATE_SECONDS", 0.1)
    config = a_config(tmp_path, **NOTIFY)

    @flow
    def long() -> None:
        logger = logging.getLogger("nobody")
        with watched(config) as run, run.showing(RunProgress(99, logger, RunMetrics("long", 99))) as progress:
            for number in range(monitoring.ENOUGH_IMAGES):
                progress.image_done([a_row(number, "quarantined")])
            wait_for(lambda: webhook, seconds=30)
            for number in range(49):
                progress.image_done([a_row(number, "quarantined")])

    long()
    (told,) = webhook
    assert "50 of 50 images were quarantined, of 99" in told["body"]


def test_a_run_that_is_stopped_has_not_failed(webhook, small_archive, tiny_folder, tmp_path, monkeypatch):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.colorize_archive.hold_output", stop)
    with pytest.raises(KeyboardInterrupt):
        colorize_archive(str(small_archive), str(tmp_path / "out"), model=str(tiny_folder), options=NOTIFY)
    assert webhook == []


def test_a_webhook_that_refuses_does_no_harm_and_its_address_is_not_logged(webhook, caplog):
    caplog.set_level(logging.DEBUG)
    monitoring._notify("custom-webhook/people", "refused", "text", logging.getLogger("here"))
    assert len(webhook) == 1
    assert "custom-webhook/people could not be told (HTTPStatusError)" in caplog.text
    assert SECRET not in caplog.text
    assert "127.0.0.1" not in "".join(r.getMessage() for r in caplog.records if r.name.startswith(("httpx", "here")))


def test_a_block_that_is_not_there_is_told_before_the_run(small_archive, tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="no block 'custom-webhook/nobody'"):
        colorize_archive(
            str(small_archive),
            str(tmp_path / "out"),
            model=str(tiny_folder),
            options={"notify": "custom-webhook/nobody"},
        )
    assert not (tmp_path / "out").exists()


def test_parameters_that_are_refused_are_told_of_too(webhook):
    with pytest.raises(Exception, match="num_actors"):
        colorize_archive("in", "out", options=NOTIFY | {"num_actors": 0})
    (told,) = webhook
    assert told["subject"] == "diffcolor: colorize-archive failed: in"
    with pytest.raises(Exception, match="options"):
        colorize_archive("in", "out", options="none")
    assert len(webhook) == 1


def test_an_address_is_no_block():
    with pytest.raises(ValueError, match="notify"):
        RunOptions(archive="in", output="out", notify="https://hooks.example/secret")


# ------------------------------------------------------------------ metrics


def scraped(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The samples of ours that Ray's agent serves: value by name and our own labels."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (sample.name, frozenset((k, v) for k, v in sample.labels.items() if k in ("run", "status", "stage", "le"))): (
            sample.value
        )
        for family in families
        for sample in family.samples
        if "diffcolor" in sample.name
    }


def test_prometheus_finds_the_numbers_of_a_run(small_archive, tmp_path):
    import ray

    run_id = f"run {tmp_path.name}"
    colorize_archive(str(small_archive), str(tmp_path / "out"), model="demo", options={"run_id": run_id})
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def sample(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
        return name, frozenset({"run": run_id, **labels}.items())

    expected = {
        sample("ray_diffcolor_images_total", status="ok"): 3,
        sample("ray_diffcolor_images_total", status="quarantined"): 1,
        sample("ray_diffcolor_images_left"): 0,
        sample("ray_diffcolor_stage_seconds_count", stage="stage1"): 3,
        sample("ray_diffcolor_stage_seconds_count", stage="stage2"): 3,
        sample("ray_diffcolor_stage_seconds_count", stage="sampling"): 4,
        sample("ray_diffcolor_stage_seconds_bucket", stage="sampling", le="3600.0"): 4,
    }
    wait_for(lambda: expected.items() <= scraped(url).items(), seconds=60)  # Ray passes them on every 10 s
    rows = query(Store(str(tmp_path / "out")), "select sampling_seconds from results where status = 'ok'").fetchall()
    found = scraped(url)
    for boundary in BOUNDARIES_SECONDS:  # Ray counts by bucket, and takes the middle of each for the sum
        within = sum(seconds <= boundary for (seconds,) in rows)
        bucket = sample("ray_diffcolor_stage_seconds_bucket", stage="sampling", le=str(float(boundary)))
        assert found[bucket] == within, boundary
    assert {name for name, labels in found if ("run", run_id) in labels} == set(EXPORTED)


def test_the_queue_is_told_again_and_again(tmp_path, monkeypatch):
    """Ray forgets a gauge that is not set for 20 s, and an image may take longer."""
    monkeypatch.setattr(monitoring, "UPDATE_SECONDS", 0.05)
    set_again = threading.Event()
    metrics = RunMetrics("slow", 7)
    monkeypatch.setattr(metrics, "queue", lambda num_left: set_again.set() if num_left == 7 else None)

    @flow
    def slow() -> None:
        with Watched(a_config(tmp_path)).showing(RunProgress(7, logging.getLogger("nobody"), metrics)):
            assert set_again.wait(30)

    slow()


def test_a_local_run_serves_its_metrics_where_it_is_told_to(tmp_path):
    """`diffcolor run` in a process of its own, with a Ray of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect")}
    (documented,) = re.findall(r"^diffcolor (run .* --metrics-port) 9404$", PAGE.read_text(), re.MULTILINE)
    arguments = documented.replace("out/demo", str(tmp_path / "out")).split()
    command = [Path(sys.executable).with_name("diffcolor"), *arguments, str(port), "--run-id", "mine"]
    log = tmp_path / "log"
    with log.open("w") as file:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)

    def is_served() -> bool:
        assert run.poll() is None, log.read_text()
        try:
            found = scraped(f"http://127.0.0.1:{port}/metrics")
        except OSError:  # not started yet
            return False
        return ("ray_diffcolor_images_left", frozenset({("run", "mine")})) in found

    try:
        wait_for(is_served, seconds=300)
    finally:
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(120) == 143


def test_the_dashboard_shows_what_is_exported():
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    (variable,) = [v for v in dashboard["templating"]["list"] if v["type"] == "query"]
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = set()
    for expression in [*expressions, variable["query"]]:
        metrics = set(re.findall(r"\b[a-z_]*diffcolor[a-z0-9_]*", expression))
        assert metrics, expression
        assert metrics <= set(EXPORTED), expression
        shown |= metrics
        labels = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", expression)) | {
            label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")
        }
        assert labels <= {"run", "status", "stage", "le"}, expression
    assert shown == set(EXPORTED)
    assert all(panel["title"] and panel["description"] for panel in dashboard["panels"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
