import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tasks.logs import Kept, about, relay

ROOT = Path(__file__).parents[2]
SCRIPT = """
import logging, os, subprocess, sys, threading, warnings
from tasks.logs import Kept, about, log_as_json, relay

log_as_json("run 7", stray_lines=True)
import prefect  # which configures logging
log_as_json("run 7")
logger = logging.getLogger("tasks.some")
logger.info("plain")
with about(shard=3):
    with about(image="a\\nb.png", attempt=2):
        logger.warning("two\\nlines with %s", os.environ["MY_API_KEY"])
    thread = threading.Thread(target=logger.info, args=("of a thread",))
    thread.start()
    thread.join()
    relay([{"name": "tasks.actor", "levelno": 20, "levelname": "INFO", "created": 0.5, "process": 1,
            "exc_text": None, "msg": "from an actor"}])
try:
    raise ValueError("s3://me:hidden-password@host/x?X-Amz-Signature=0123abcd&desig=1")
except ValueError:
    logger.exception("failed")
logger.info("odd", extra={"numbers": [float("nan"), {1: os.environ["MY_API_KEY"]}]})
logging.getLogger("httpx").info("left out")
warnings.warn("beware")
print("printed", file=sys.stderr)
os.write(2, b"from C \\xff\\n")
subprocess.run([sys.executable, "-c", "import sys; print('of a child', file=sys.stderr)"])
"""


def test_every_line_on_stderr_is_json_and_none_has_a_secret():
    environment = {"MY_API_KEY": 'top "secret" value', "PREFECT_LOGGING_LEVEL": "INFO"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True, cwd="."
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert not any(secret in done.stderr for secret in ("secret", "hidden-password", "0123abcd", "NaN"))
    assert all(list(line)[:2] == ["time", "level"] and line["run"] == "run 7" for line in lines)
    by_message = {line["message"].partition("\n")[0]: line for line in lines}
    assert {"plain", "two", "of a thread", "from an actor", "failed", "odd"} < by_message.keys()
    assert "left out" not in by_message
    two = by_message["two"]
    assert two["message"] == "two\nlines with ***"
    assert (two["level"], two["logger"]) == ("WARNING", "tasks.some")
    assert (two["shard"], two["image"], two["attempt"]) == (3, "a\nb.png", 2)
    assert "shard" not in by_message["plain"].keys() | by_message["of a thread"].keys()
    actor = by_message["from an actor"]
    assert (actor["shard"], actor["logger"], actor["time"]) == (3, "tasks.actor", "1970-01-01T00:00:00.500000+00:00")
    assert "s3://me:***@host/x?X-Amz-Signature=***&desig=1" in by_message["failed"]["exc_info"]
    assert by_message["odd"]["numbers"] == ["nan", {"1": "***"}]
    stray = {line["message"] for line in lines if line["logger"] == "stderr"}
    assert stray == {"printed", "from C \\xff", "of a child"}
    assert any(line["logger"] == "py.warnings" and "beware" in line["message"] for line in lines)


def test_a_reader_that_has_left_stops_nothing():
    code = "import logging\nfrom tasks.logs import log_as_json\nlog_as_json()\n"
    code += "for _ in range(9): logging.getLogger('tasks').error('x' * 20_000)\nprint('done')"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stderr.close()
        assert process.stdout.read() == "done\n"


def test_what_an_actor_keeps_is_plain_and_is_taken_once(caplog):
    kept = Kept.install()
    try:
        with about(image="a.png"):
            try:
                raise RuntimeError("no memory")
            except RuntimeError:
                logging.getLogger("tasks.colorize").warning("%s failed", "a.png", exc_info=True)
    finally:
        logging.getLogger().removeHandler(kept)
    records = kept.take()
    assert kept.take() == []
    assert json.loads(json.dumps(records)) == records
    assert records[0]["msg"] == "a.png failed"
    assert records[0]["image"] == "a.png"
    assert "RuntimeError: no memory" in records[0]["exc_text"]
    caplog.clear()
    relay(records)
    (again,) = caplog.records
    assert (again.getMessage(), again.created, again.image) == ("a.png failed", records[0]["created"], "a.png")


def test_a_run_logs_json_lines_of_the_driver_and_of_the_actors(tmp_path):
    """A real run as a process of its own, with the bundled demo model."""
    archive = tmp_path / "scans"
    archive.mkdir()
    shutil.copy(ROOT / "examples/archive/01-ball-and-bottle.png", archive / "good.png")
    (archive / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    quick = [f"--set={part}=2" for part in ("stage1.num_steps", "stage2.embedding_steps", "stage2.model_steps")]
    code = "from flows.cli import app; app()"
    arguments = ["run", str(archive), str(tmp_path / "out"), "--model", "demo", "--run-id", "mine", *quick]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    secret = "0123456789abcdef" * 4
    environment |= {"DIFFCOLOR_LOG_FORMAT": "json", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert done.returncode == 3, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert secret not in done.stderr

    where = {"run": "mine", "shard": 0, "attempt": 1}
    (bad,) = [line for line in lines if line["level"] == "WARNING" and line.get("image") == "broken.jpg"]
    assert bad.items() >= where.items()
    assert "quarantined (UnreadableImageError" in bad["message"]
    good = [line for line in lines if line.get("image") == "good.png"]
    assert all(line.items() >= where.items() for line in good)
    assert [line["message"] for line in good if line["logger"] == "tasks.progress"] == ["good.png: ok"]
    (fitted,) = [line for line in good if line["logger"] == "tasks.colorize"]
    assert "fit made in" in fitted["message"]
    assert fitted["process"] != bad["process"], "of the actor's process"
    ends = [line["message"] for line in lines if line["logger"] == "stderr"]
    assert any(message.startswith("1 ok, 1 quarantined") for message in ends)
    assert all(line["run"] == "mine" for line in lines)
