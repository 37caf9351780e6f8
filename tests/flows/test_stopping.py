"""`--max-hours` in processes of their own: a signal in this one would end the tests."""

import subprocess
import sys

import pytest

from support.runs import ROOT

IN_A_COMMAND = """
with stoppable() as stop:
    try:
        with stopping_after(1e-5):
            threading.Event().wait(60)
    except KeyboardInterrupt:
        raise SystemExit(stop.exit_code)
"""
IN_A_SCRIPT = """
try:
    with stopping_after(1e-5):
        threading.Event().wait(60)
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    raise SystemExit(7)
"""
ENDED_BEFORE = """
with stopping_after(1.0):
    (timer,) = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
timer.join(60)
assert not timer.is_alive()
"""
WITHOUT_LIMIT = """
with stopping_after(None):
    assert threading.active_count() == 1
"""


@pytest.mark.parametrize(
    ("code", "exit_code", "says"),
    [(IN_A_COMMAND, 143, True), (IN_A_SCRIPT, 7, True), (ENDED_BEFORE, 0, False), (WITHOUT_LIMIT, 0, False)],
    ids=["command", "script", "ended before", "without limit"],
)
def test_hours_that_have_passed_stop_the_process_as_sigterm_does(code, exit_code, says):
    imports = "import signal, threading\nfrom flows.stopping import stoppable, stopping_after\n"
    done = subprocess.run([sys.executable, "-c", imports + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == exit_code, done.stderr
    assert ("hours have passed (--max-hours)" in done.stderr) == says
