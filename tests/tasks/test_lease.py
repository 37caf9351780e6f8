import json
import subprocess
import sys
import threading

import psutil
import pytest

from tasks import lease
from tasks.errors import LeaseLostError, OutputBusyError
from tasks.lease import hold_output, is_run_open, last_generation, last_record
from tasks.storage import this_machine
from tests.conftest import ON_S3_TOO

RECORD = {"run_id": "one", "archive": "in"}


@pytest.fixture
def output(store):
    return store


def keys(output):
    return [key for key, _ in output.list("runs")]


@ON_S3_TOO
def test_each_run_gets_the_next_number_and_leaves_an_end(output):
    for number in (1, 2):
        with hold_output(output, RECORD) as held:
            assert held.generation == number
            held.check()
            held.end({"status": "finished"})
    assert keys(output) == ["runs/000001.end", "runs/000001.json", "runs/000002.end", "runs/000002.json"]
    assert last_generation(output) == 2
    assert last_record(output)["archive"] == "in"


def test_a_run_that_did_nothing_leaves_no_trace(output):
    with hold_output(output, RECORD) as held:
        held.end(None)
    assert keys(output) == []
    assert last_record(output) is None


def test_a_run_that_fails_says_so(output):
    with pytest.raises(ZeroDivisionError), hold_output(output, RECORD):
        _ = 1 / 0
    assert json.loads(output.read("runs/000001.end"))["status"] == "stopped"


@pytest.mark.parametrize("fails", [False, True])
def test_what_comes_after_a_run_comes_once_its_lease_is_given_up(output, fails):
    seen = []

    def work():
        with hold_output(output, RECORD, after=lambda store: seen.append(is_run_open(store))) as held:
            assert is_run_open(output)
            if fails:
                raise KeyboardInterrupt
            held.end({"status": "finished"})

    if fails:
        with pytest.raises(KeyboardInterrupt):
            work()
    else:
        work()
    assert seen == [False]


def test_a_stopped_run_ends_as_stopped_even_if_what_comes_after_fails(output, caplog):
    def after(store):
        raise OSError("503 Slow Down")

    with pytest.raises(KeyboardInterrupt), hold_output(output, RECORD, after=after):
        raise KeyboardInterrupt
    assert "503 Slow Down" in caplog.text
    with pytest.raises(OSError, match="503"), hold_output(output, RECORD, after=after) as held:
        held.end(None)


@ON_S3_TOO
def test_two_at_once_have_one_winner(output):
    won, lost, start = [], [], threading.Barrier(8)

    def race():
        start.wait()
        try:
            with hold_output(output, RECORD) as held:
                won.append(held.generation)
                finished.wait(30)
                held.end({"status": "finished"})
        except OutputBusyError as error:
            lost.append(error)
            if len(lost) == 7:
                finished.set()

    finished = threading.Event()
    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [1]
    assert len(lost) == 7


def abandoned(output, **values):
    """The record of a run that was killed in a process of this machine that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    record = RECORD | {"machine": this_machine(), "pid": process.pid, "process_started": 1.0} | values
    output.write("runs/000001.json", json.dumps(record).encode())
    output.write("runs/000001.beat", b"7")


def test_a_killed_run_of_this_machine_is_taken_over_at_once(output):
    abandoned(output)
    with hold_output(output, RECORD) as held:
        assert held.generation == 2
        held.end({"status": "finished"})


def test_a_process_that_only_has_the_same_number_is_not_the_run(output):
    abandoned(output, pid=psutil.Process().pid)
    with hold_output(output, RECORD) as held:
        held.end(None)


def test_a_run_of_another_machine_is_watched(output, monkeypatch):
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.6)
    monkeypatch.setattr(lease, "BEAT_EVERY_SECONDS", 0.05)
    abandoned(output, machine="elsewhere")
    with hold_output(output, RECORD) as held:  # its beat stands still
        assert held.generation == 2
        record = json.loads(output.read("runs/000002.json")) | {"machine": "elsewhere"}
        output.write("runs/000002.json", json.dumps(record).encode())
        with pytest.raises(OutputBusyError, match="run 'one'"), hold_output(output, RECORD):  # this one's does not
            pass


@ON_S3_TOO
def test_who_has_been_taken_over_stops_writing(output):
    def work():
        with hold_output(output, RECORD) as held:
            held.check()
            output.write("runs/000002.json", b"{}")
            held.check()

    with pytest.raises(LeaseLostError, match="taken over"):
        work()
    assert json.loads(output.read("runs/000001.end"))["status"] == "taken over"
