import sys

import pytest
from typer.testing import CliRunner

from flows.cli import app


@pytest.mark.parametrize("package", ["scipy", "torchmetrics"])
def test_a_missing_extra_is_named_in_one_line(monkeypatch, package):
    for name in [n for n in sys.modules if n.startswith(("diffcolor_study", package))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    result = CliRunner().invoke(app, ["study", "--num", "1"])
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "pip install 'diffcolor-archive[study]'" in line
    assert package in line
