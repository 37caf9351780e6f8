"""The import contracts in pyproject.toml: which package may import which, who may know Prefect, Ray, DuckDB."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_dependencies_point_one_way():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "8 kept, 0 broken" in done.stdout


def test_the_contracts_can_break(tmp_path):
    """The same contracts over the same code, with an import too many in three places."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for package in ("diffcolor_scans", "diffcolor_core", "diffcolor_study", "diffcolor_training", "tasks", "flows"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("bundle", "judge"))
    breach(tmp_path, "diffcolor_core/config.py", "import ray")
    breach(tmp_path, "tasks/records.py", "import duckdb")
    breach(tmp_path, "tasks/rows.py", "import prefect")
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for contract in (
        "diffcolor_core knows no orchestrator",
        "of tasks, only tasks.shards knows Prefect",
        "an actor's process knows neither Prefect nor DuckDB",
    ):
        assert f"{contract} BROKEN" in done.stdout


def breach(folder, file, statement):
    path = folder / file
    path.write_text(f"{path.read_text()}\n{statement}\n")


def test_what_an_actors_process_imports():
    """Contracts see import statements; this sees what they load."""
    code = "import sys, tasks.colorize; print(sorted({'prefect', 'ray'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
