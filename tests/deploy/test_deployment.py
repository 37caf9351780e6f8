"""The deployment for real: Prefect server on loopback, deploy, process worker, `prefect deployment run --watch`."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import BaseModel, ConfigDict

from support.pictures import make_archive
from support.runs import MARK, processes
from support.waiting import wait_for
from support.webhook import listening
from tasks.manifest import query
from tasks.storage import Store

ROOT = Path(__file__).parents[2]
PREFECT = Path(sys.executable).with_name("prefect")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Schedule(_Strict):
    cron: str
    timezone: str
    active: bool


class _WorkPool(_Strict):
    name: str
    job_variables: dict[str, dict[str, str]]


class _Deployment(_Strict):
    name: str
    description: str
    entrypoint: str
    tags: list[str]
    parameters: dict[str, object]
    work_pool: _WorkPool
    schedules: list[_Schedule] = []
    concurrency_limit: int | None = None


def test_the_file_has_no_misspelt_key_and_fits_the_flow():
    """`prefect deploy` accepts a key that it does not know and makes a deployment without it."""
    content = yaml.safe_load((ROOT / "deploy" / "prefect.yaml").read_text())
    assert set(content) == {"name", "prefect-version", "pull", "definitions", "deployments"}
    assert content["pull"] == [], "nothing but an empty list keeps Prefect from a step that enters this checkout"
    deployments = {d["name"]: _Deployment(**d) for d in content["deployments"]}
    assert set(deployments) == {"on-demand", "nightly", "recolor"}
    assert [s.cron for s in deployments["nightly"].schedules] == ["0 2 * * *"]
    for deployment in deployments.values():
        parameters = load_flow_from_entrypoint(deployment.entrypoint, use_placeholder_flow=False).parameters.properties
        assert set(deployment.parameters) <= set(parameters)
        for name, value in deployment.parameters.items():
            assert value != parameters[name].get("default"), f"{name} is the default already"


@pytest.fixture
def prefect(tmp_path):
    """A server on a free loopback port and a function that runs `prefect ...` against it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path / "prefect"
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    env |= {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "DIFFCOLOR_ARCHIVE": "/in",
        "DIFFCOLOR_OUTPUT": "/out",
        "NO_COLOR": "1",
        MARK: secrets.token_hex(8),
        "COLUMNS": "200",
    }
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        log = (tmp_path / f"{arguments[0]}.log").open("w")
        process = subprocess.Popen(  # anywhere: the worker needs no checkout
            [PREFECT, *arguments], env=env, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
        started.append(process)
        return process

    def run(*arguments: str, timeout: float = 180) -> str:
        done = subprocess.run(
            [PREFECT, "--no-prompt", *arguments],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    start("server", "start", "--host", "127.0.0.1", "--port", str(port))

    def healthy() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/api/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    wait_for(healthy, seconds=120)
    run.start = start  # type: ignore[attr-defined]
    run.api = f"http://127.0.0.1:{port}/api"  # type: ignore[attr-defined]
    run.mark = env[MARK]  # type: ignore[attr-defined]
    yield run
    for process in reversed(started):
        os.killpg(process.pid, signal.SIGINT)
    for process in started:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.timeout(600)
def test_deploy_work_and_run(prefect, tiny_folder, small_archive, tmp_path):
    def flow_run(id: str) -> dict:
        return httpx.get(f"{prefect.api}/flow_runs/{id}").json()

    prefect("work-pool", "create", "diffcolor", "--type", "process")
    prefect("deploy", "--all", "--prefect-file", "deploy/prefect.yaml")
    listed = prefect("deployment", "ls")
    assert "colorize-archive/on-demand" in listed
    assert "colorize-archive/nightly" in listed
    schedules = httpx.post(f"{prefect.api}/deployments/filter", json={}).json()
    assert {d["name"]: [s["schedule"]["cron"] for s in d["schedules"]] for d in schedules} == {
        "on-demand": [],
        "nightly": ["0 2 * * *"],
        "recolor": [],
    }
    # the form: every parameter is explained, and fixed values are choices
    (form,) = [d["parameter_openapi_schema"] for d in schedules if d["name"] == "on-demand"]
    fields = form["properties"] | form["definitions"]["MoreOptions"]["properties"]
    assert all(field["description"] for field in fields.values())
    assert {name for name, field in fields.items() if field["title"] != name} == set(), (
        "the form shows the options' names"
    )
    choices = {name for name, field in fields.items() if "enum" in json.dumps(field)}
    assert choices == {"preset", "image_format", "access_copy", "device", "retry", "dtype", "log_format"}
    assert "Created automation 'crash-zombie-flow-runs'" in prefect(
        "automation", "create", "--from-file", "deploy/zombies.yaml"
    )
    prefect.start("worker", "start", "--pool", "diffcolor", "--type", "process", "--limit", "1")
    output = tmp_path / "out"
    text = prefect(
        *("deployment", "run", "colorize-archive/on-demand", "--watch"),
        *(
            "-p",
            f"archive={small_archive}",
            "-p",
            f"output={output}",
            "-p",
            f"model={tiny_folder}",
            "-p",
            "preset=demo",
        ),
        *("-p", 'options={"shard_size": 2, "access_copy": "jpeg"}'),
        timeout=400,
    )
    assert "finished successfully" in text
    found = query(Store(str(output)), "select status, count(*) from results group by all order by all").fetchall()
    assert found == [("ok", 4), ("quarantined", 1)]
    assert query(Store(str(output)), "select count(access_uri) from results").fetchall() == [(4,)]
    targets = tmp_path / "targets.csv"
    targets.write_text("image,target_prompt\nscan 1.png,a purple box on a yellow table\n")
    text = prefect(
        *("deployment", "run", "recolor-archive/recolor", "--watch"),
        *("-p", f"output={output}", "-p", f"catalog={targets}"),
        timeout=400,
    )
    assert "finished successfully" in text
    assert query(Store(str(output)), "select count(*) from results where fit_reused").fetchall() == [(1,)]

    # a relative output would be deleted with the worker's folder
    text = prefect(
        *("deployment", "run", "colorize-archive/on-demand"),
        *("-p", f"archive={small_archive}", "-p", "output=out", "-p", f"model={tiny_folder}", "-p", "preset=demo"),
    )
    (flow_run_id,) = re.findall(r"UUID: (\S+)", text)
    wait_for(lambda: flow_run(flow_run_id)["state_type"] == "FAILED", seconds=120)
    assert "'out' is relative to the worker's folder" in flow_run(flow_run_id)["state"]["message"]

    # a cancelled run commits what is finished, releases its actors, and is ended
    many = make_archive(tmp_path / "many", 16)
    cancelled = Store(str(tmp_path / "cancelled"))
    text = prefect(
        *("deployment", "run", "colorize-archive/on-demand"),
        *("-p", f"archive={many}", "-p", f"output={cancelled.url}", "-p", f"model={tiny_folder}", "-p", "preset=demo"),
    )
    (flow_run_id,) = re.findall(r"UUID: (\S+)", text)
    wait_for(lambda: sum("/target-" in key for key, _ in cancelled.list()) >= 3, seconds=200)
    prefect("flow-run", "cancel", flow_run_id)

    wait_for(lambda: flow_run(flow_run_id)["state_type"] == "CANCELLED", seconds=120)
    wait_for(lambda: not processes(prefect.mark, "ray::", "raylet"), seconds=60)
    assert cancelled.has("runs/000001.end"), "a cancelled run must not look alive"
    ((num_ok,),) = query(cancelled, "select count(*) from results where status = 'ok'").fetchall()
    assert 2 <= num_ok < 17, "what was finished is committed, what was not is left to the next run"


@pytest.mark.timeout(600)
def test_people_are_told_once_of_a_run_that_fails_and_of_one_that_is_killed(prefect, tiny_folder, tmp_path):
    prefect("work-pool", "create", "diffcolor", "--type", "process")
    prefect("deploy", "--name", "on-demand", "--prefect-file", "deploy/prefect.yaml")
    prefect.start("worker", "start", "--pool", "diffcolor", "--type", "process", "--limit", "1")
    many, output = make_archive(tmp_path / "many", 200), Store(str(tmp_path / "out"))
    run = (
        "deployment",
        "run",
        "colorize-archive/on-demand",
        "-p",
        f"output={output.url}",
        "-p",
        f"model={tiny_folder}",
    )
    few_steps = {"stage1.num_steps": 2, "stage2.embedding_steps": 2, "stage2.model_steps": 2}
    options = {"notify": "custom-webhook/people", "overrides": few_steps}
    run += ("-p", "preset=demo", "-p", f"options={json.dumps(options)}")
    with listening() as (url, received):
        with temporary_settings({PREFECT_API_URL: prefect.api}):
            CustomWebhookNotificationBlock(name="people", url=url, json_data={"subject": "{{subject}}"}).save("people")
        prefect(*run, "-p", f"archive={tmp_path / 'nowhere'}")
        wait_for(lambda: received, seconds=120)
        prefect(*run, "-p", f"archive={many}")
        wait_for(lambda: any(key.startswith("images/") for key, _ in output.list()), seconds=200)
        for process in processes(prefect.mark, "prefect.engine"):
            process.kill()
        wait_for(lambda: len(received) == 2, seconds=120)
    subjects = [told["subject"] for told in received]
    assert subjects == ["diffcolor: colorize-archive failed: nowhere", "diffcolor: colorize-archive crashed: many"]


@pytest.mark.skipif(not os.environ.get("DIFFCOLOR_TEST_SLOW"), reason="waits for minutes: set DIFFCOLOR_TEST_SLOW=1")
@pytest.mark.timeout(900)
def test_the_automation_marks_a_killed_flow_as_crashed(prefect, tiny_folder, tmp_path):
    """The flow and its worker are killed: nobody is left who could tell Prefect."""
    prefect("work-pool", "create", "diffcolor", "--type", "process")
    prefect("deploy", "--all", "--prefect-file", "deploy/prefect.yaml")
    prefect("automation", "create", "--from-file", "deploy/zombies.yaml")
    worker = prefect.start("worker", "start", "--pool", "diffcolor", "--type", "process", "--limit", "1")
    many, output = make_archive(tmp_path / "many", 200), Store(str(tmp_path / "out"))
    text = prefect(
        *("deployment", "run", "colorize-archive/on-demand"),
        *("-p", f"archive={many}", "-p", f"output={output.url}", "-p", f"model={tiny_folder}", "-p", "preset=demo"),
    )
    (flow_run_id,) = re.findall(r"UUID: (\S+)", text)
    wait_for(lambda: any("/target-" in key for key, _ in output.list()), seconds=200)
    worker.kill()
    for process in processes(prefect.mark, "prefect.engine", "prefect flow-run execute"):
        process.kill()
    wait_for(lambda: not processes(prefect.mark, "ray::"), seconds=60)
    flow_run = f"{prefect.api}/flow_runs/{flow_run_id}"
    assert httpx.get(flow_run).json()["state_type"] == "RUNNING", "nobody has told Prefect yet"
    wait_for(lambda: httpx.get(flow_run).json()["state_type"] == "CRASHED", seconds=240)
    assert httpx.get(flow_run).json()["state"]["message"] == "no heartbeat for 90 s"
