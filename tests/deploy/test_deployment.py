"""The deployment for real: Prefect server on loopback, deploy, process worker, `prefect deployment run --watch`."""

import json
import os
import secrets
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass
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
from support.s3_server import free_port
from support.waiting import wait_for
from support.webhook import listening
from tasks.manifest import query
from tasks.storage import Store

ROOT = Path(__file__).parents[2]
FEW_STEPS = {"stage1.num_steps": 2, "stage2.embedding_steps": 2, "stage2.model_steps": 2, "sampling.num_steps": 3}
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


@dataclass(frozen=True)
class Deployed:
    """Prefect's server, with our deployments and one worker. mark: see `support.runs.processes`."""

    api: str
    environment: dict[str, str]
    worker: subprocess.Popen[bytes]

    @property
    def mark(self) -> str:
        return self.environment[MARK]

    def prefect(self, *arguments: str) -> str:
        """What `prefect ...` prints."""
        command = [PREFECT, "--no-prompt", *arguments]
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deployments(self) -> dict[str, dict]:
        """By name."""
        return {found["name"]: found for found in httpx.post(f"{self.api}/deployments/filter", json={}).json()}

    def start(self, archive: Path, output: str, model: Path, **options: object) -> str:
        """A run of `on-demand`, as Prefect's pages start it; its id."""
        parameters = {"archive": str(archive), "output": output, "model": str(model), "preset": "demo"}
        address = f"{self.api}/deployments/{self.deployments()['on-demand']['id']}/create_flow_run"
        answer = httpx.post(address, json={"parameters": parameters | {"options": options | {"overrides": FEW_STEPS}}})
        assert answer.is_success, answer.text
        return str(answer.json()["id"])

    def flow_run(self, id: str) -> dict:
        return dict(httpx.get(f"{self.api}/flow_runs/{id}").json())


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """A server on a free loopback port, what deploy/README.md has one do, and a worker."""
    folder = tmp_path_factory.mktemp("deployed")
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    env |= {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "DIFFCOLOR_ARCHIVE": "/in",
        "DIFFCOLOR_OUTPUT": "/out",
        "NO_COLOR": "1",
        MARK: secrets.token_hex(8),
        "COLUMNS": "200",
    }
    with ExitStack() as stack:

        def start(*arguments: str) -> subprocess.Popen[bytes]:
            log = stack.enter_context((folder / f"{arguments[0]}.log").open("w"))
            process = subprocess.Popen(  # anywhere: the worker needs no checkout
                [PREFECT, *arguments], env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
            stack.callback(_end, process)
            return process

        def healthy() -> bool:
            try:
                return httpx.get(f"{api}/health", timeout=2).status_code == 200
            except httpx.HTTPError:
                return False

        server = start("server", "start", "--host", "127.0.0.1", "--port", str(port))
        wait_for(healthy, seconds=240)
        prefect = Deployed(api, env, server).prefect
        prefect("work-pool", "create", "diffcolor", "--type", "process")
        prefect("deploy", "--all", "--prefect-file", "deploy/prefect.yaml")
        made = prefect("automation", "create", "--from-file", "deploy/zombies.yaml")
        assert "Created automation 'crash-zombie-flow-runs'" in made
        worker = start("worker", "start", "--pool", "diffcolor", "--type", "process", "--limit", "1")
        yield Deployed(api, env, worker)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def test_the_deployments_have_a_schedule_and_a_form(deployed):
    deployments = deployed.deployments()
    assert {name: [s["schedule"]["cron"] for s in d["schedules"]] for name, d in deployments.items()} == {
        "on-demand": [],
        "nightly": ["0 2 * * *"],
        "recolor": [],
    }
    # the form: every parameter is explained, and fixed values are choices
    form = deployments["on-demand"]["parameter_openapi_schema"]
    fields = form["properties"] | form["definitions"]["MoreOptions"]["properties"]
    assert all(field["description"] for field in fields.values())
    assert {name for name, field in fields.items() if field["title"] != name} == set(), (
        "the form shows the options' names"
    )
    choices = {name for name, field in fields.items() if "enum" in json.dumps(field)}
    assert choices == {"preset", "image_format", "access_copy", "device", "retry", "dtype", "log_format"}


@pytest.mark.timeout(900)
def test_a_run_and_a_recolor_from_the_command_line(deployed, tiny_folder, small_archive, tmp_path):
    def watched(deployment: str, **parameters: object) -> None:
        given = [word for name, value in parameters.items() for word in ("-p", f"{name}={value}")]
        assert "finished successfully" in deployed.prefect("deployment", "run", deployment, "--watch", *given)

    output = Store(str(tmp_path / "out"))
    options = json.dumps({"shard_size": 2, "access_copy": "jpeg", "overrides": FEW_STEPS})
    what = {"archive": small_archive, "output": output.url, "model": tiny_folder, "preset": "demo", "options": options}
    watched("colorize-archive/on-demand", **what)
    found = query(output, "select status, count(*) from results group by all order by all").fetchall()
    assert found == [("ok", 4), ("quarantined", 1)]
    assert query(output, "select count(access_uri) from results").fetchall() == [(4,)]
    targets = tmp_path / "targets.csv"
    targets.write_text("image,target_prompt\nscan 1.png,a purple box on a yellow table\n")
    watched("recolor-archive/recolor", output=output.url, catalog=targets)
    assert query(output, "select count(*) from results where fit_reused").fetchall() == [(1,)]


@pytest.mark.timeout(900)
def test_a_cancelled_run_commits_what_is_finished_releases_its_actors_and_is_ended(deployed, tiny_folder, tmp_path):
    many, output = make_archive(tmp_path / "many", 200), Store(str(tmp_path / "out"))
    id = deployed.start(many, output.url, tiny_folder)
    wait_for(lambda: sum("/target-" in key for key, _ in output.list()) >= 3, seconds=300)
    deployed.prefect("flow-run", "cancel", id)

    wait_for(lambda: deployed.flow_run(id)["state_type"] == "CANCELLED", seconds=240)
    wait_for(lambda: not processes(deployed.mark, "ray::", "raylet"), seconds=120)
    assert output.has("runs/000001.end"), "a cancelled run must not look alive"
    ((num_ok,),) = query(output, "select count(*) from results where status = 'ok'").fetchall()
    assert 2 <= num_ok < 200, "what was finished is committed, what was not is left to the next run"


@pytest.mark.timeout(900)
def test_people_are_told_once_of_a_run_that_fails_and_of_one_that_is_killed(
    deployed, tiny_folder, small_archive, tmp_path
):
    with listening() as (url, received):
        with temporary_settings({PREFECT_API_URL: deployed.api}):
            CustomWebhookNotificationBlock(name="people", url=url, json_data={"subject": "{{subject}}"}).save("people")
        told = {"notify": "custom-webhook/people"}
        # a relative output would be deleted with the worker's folder
        failed = deployed.start(small_archive, "out", tiny_folder, **told)
        wait_for(lambda: received, seconds=240)
        assert "'out' is relative to the worker's folder" in deployed.flow_run(failed)["state"]["message"]
        killed = deployed.start(make_archive(tmp_path / "many", 200), str(tmp_path / "out"), tiny_folder, **told)
        wait_for(lambda: deployed.flow_run(killed)["state_type"] == "RUNNING", seconds=240)
        for process in processes(deployed.mark, "prefect.engine"):
            process.kill()
        wait_for(lambda: len(received) == 2, seconds=240)
    subjects = [told["subject"] for told in received]
    assert subjects == ["diffcolor: colorize-archive failed: archive", "diffcolor: colorize-archive crashed: many"]


@pytest.mark.skipif(not os.environ.get("DIFFCOLOR_TEST_SLOW"), reason="waits for minutes: set DIFFCOLOR_TEST_SLOW=1")
@pytest.mark.timeout(900)
def test_the_automation_marks_a_killed_flow_as_crashed(deployed, tiny_folder, tmp_path):
    """The flow and its worker are killed: nobody is left who could tell Prefect."""
    many, output = make_archive(tmp_path / "many", 200), Store(str(tmp_path / "out"))
    id = deployed.start(many, output.url, tiny_folder)
    wait_for(lambda: any("/target-" in key for key, _ in output.list()), seconds=300)
    deployed.worker.kill()
    for process in processes(deployed.mark, "prefect.engine", "prefect flow-run execute"):
        process.kill()
    wait_for(lambda: not processes(deployed.mark, "ray::"), seconds=60)
    assert deployed.flow_run(id)["state_type"] == "RUNNING", "nobody has told Prefect yet"
    wait_for(lambda: deployed.flow_run(id)["state_type"] == "CRASHED", seconds=240)
    assert deployed.flow_run(id)["state"]["message"] == "no heartbeat for 90 s"
