import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from diffcolor_core import DiffColor, __version__
from flows.cli import app, common
from flows.cli.coloring import _warn_of_demo
from flows.cli.common import notes
from flows.cli.options import checked
from tasks.manifest import commit_part
from tasks.progress import visible
from tasks.storage import Store
from tests.tasks.test_manifest import row


@pytest.fixture
def run():
    runner = CliRunner()

    def call(*arguments: object, code: int = 0) -> str:
        result = runner.invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert result.exit_code == code, result.output
        return result.output

    return call


COMMANDS = list(typer.main.get_command(app).commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_help(run, command):
    assert re.search(rf"Usage: \S+ {command} ", run(command, "-h"))
    assert f"│ {command} " in run("--help")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "status"])  # it takes nothing
def test_help_teaches_by_an_example(run, command):
    assert f"Example: diffcolor {command} " in run(command, "--help")


def test_the_help_of_run_shows_about_ten_flags_first(run):
    text = run("run", "--help")
    panels = {part.split(" ─")[0]: part for part in text.split("╭─ ")[1:]}
    names = ["Arguments", "Options", "Before a run", "Pictures", "Machines", "Resuming and faults", "Afterwards"]
    assert list(panels) == names
    first = re.findall(r"^│ +(--[a-z-]+)", panels["Options"], re.MULTILINE)
    assert first == [
        "--output",
        "--catalog",
        "--prompt",
        "--caption",
        "--model",
        "--preset",
        "--limit",
        "--quiet",
        "--verbose",
        "--help",
    ]


def test_version(run):
    assert run("--version") == f"diffcolor {__version__}\n"


def test_shells_can_complete(run):
    assert "--install-completion" in run("--help")


def test_one_picture(run, small_archive, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(common.console, "width", 400)  # so that no line of its table is broken
    out = tmp_path / "one"
    text = run(
        *(
            "colorize",
            small_archive / "scan 0.png",
            "--prompt",
            "a ball on a table",
            "--target",
            "a red ball on a table",
        ),
        *("--target", "a [blue] ball [/b] on a table", "--model", tiny_folder, "-o", out),
    )
    assert {p.name for p in out.iterdir()} == {"primary.png", "target-1.png", "target-2.png"}
    assert "a [blue] ball [/b] on a table" in text, "a prompt is no markup"


def test_one_picture_as_tiff_with_its_fit_kept(run, small_archive, tiny_folder, tmp_path):
    scan, out = small_archive / "scan 0.png", tmp_path / "one"
    options = ("--prompt", "a ball on a table", "--format", "tiff", "--save-fit", tmp_path / "fit")
    run("colorize", scan, *options, "--model", tiny_folder, "-o", out)
    with Image.open(out / "primary.tif") as image:
        assert b"a ball on a table" in image.tag_v2[700]
    pipe = DiffColor.from_pretrained(str(tiny_folder))
    result = pipe.recolor(pipe.load_fit(str(tmp_path / "fit")))
    with Image.open(out / "primary.tif") as image:
        np.testing.assert_array_equal(np.asarray(image), result.image.pixels)


def test_a_study_by_command(run, tiny_folder, tmp_path):
    options = ("--task", "edit", "--method", "img2img", "--num", 1, "--model", tiny_folder)
    text = run("study", *options, "--json", tmp_path / "s.json", "--keep", tmp_path / "pictures")
    assert "edit_success" in text
    assert json.loads((tmp_path / "s.json").read_text())["methods"]["img2img"]["leakage"]["mean"] >= 0
    assert (tmp_path / "pictures" / "edit" / "0000" / "img2img.png").exists()
    assert "imagic" in run("study", "--method", "list")
    assert "no method best" in run("study", "--method", "best", "--model", tiny_folder, code=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "nonsense"}, "no model 'nonsense'"),
        ({"--preset": "quick"}, "'quick' is not one of"),
        ({"--device": "gpu"}, "give `auto`, `cpu`"),
        ({"--device": "cuda:99"}, "torch sees"),
        ({"--set": "stage2.alphas=1"}, "did you mean 'stage2.alpha'"),
        ({"--set": "batch_size"}, "PATH=VALUE"),
        ({"--set": "stage1.learning_rate=Infinity"}, "finite number"),
        ({"--prompt": " "}, "context prompt is empty"),
        ({"image": "broken.jpg"}, "OSError|truncated|not a picture"),
        ({"image": "none.png"}, "there is no picture at"),
    ],
)
def test_wrong_usage_of_colorize_is_exit_2(run, small_archive, tiny_folder, tmp_path, change, message):
    options = {"--prompt": "a ball", "--model": str(tiny_folder), "--output": str(tmp_path / "o")}
    image = small_archive / change.pop("image", "scan 0.png")
    options |= change
    output = run("colorize", image, *(part for option in options.items() for part in option), code=2)
    assert any(part in output for part in message.split("|")), output


@pytest.mark.usefixtures("without_actors")
def test_an_archive_by_command(run, small_archive, tiny_folder, tmp_path):
    output = tmp_path / "out"
    arguments = ("run", small_archive, output, "--model", tiny_folder, "--run-id", "first")
    assert "4 ok, 1 quarantined, 0 failed (0 of them done before)" in run(*arguments, code=3)
    assert "(5 of them done before)" in run(*arguments, code=3)
    (small_archive / "broken.jpg").unlink()
    catalog = small_archive / "catalog.csv"
    catalog.write_text("\n".join(line for line in catalog.read_text().splitlines() if "broken" not in line))
    assert "4 ok, 0 quarantined" in run(*arguments, code=0)

    sql = "select image_key, target_prompt from results where status = 'ok' order by all"
    rows = json.loads(run("query", output, sql, "--format", "json"))
    assert len(rows) == 4
    assert rows[0] == {"image_key": "scan 0.png", "target_prompt": "a blue ball on a green table"}
    table = list(csv.DictReader(io.StringIO(run("query", output, sql, "--format", "csv"))))
    assert [row["image_key"] for row in table] == [row["image_key"] for row in rows]
    assert "scan 0.png" in run("query", output, sql)
    assert "read-only" in run("query", output, "drop view results", code=2)
    assert "describe" not in run("query", output, "describe results")
    text = run("status", output)
    assert "first" in text
    assert "UnreadableImageError" in text


@pytest.mark.usefixtures("without_actors")
def test_settings_by_command_hold_for_new_colours_too(run, small_archive, tiny_folder, tmp_path, monkeypatch):
    """And relative paths, wherever the second command is given."""
    output, targets = tmp_path / "out", tmp_path / "targets.csv"
    monkeypatch.chdir(small_archive)
    options = ("--limit", 2, "--set", "stage2.adapter_rank=2", "--set", "stage1.enabled=false")
    run("run", ".", output, "--model", os.path.relpath(tiny_folder), *options, code=3)
    monkeypatch.chdir("/")
    targets.write_text("image,target_prompt\nscan 0.png,a white ball on a red table\n")
    run("recolor", output, "--catalog", targets)
    sql = "select fit_reused, count(*) as n from results where status = 'ok' group by all order by all"
    assert json.loads(run("query", output, sql, "--format", "json")) == [
        {"fit_reused": False, "n": 2},
        {"fit_reused": True, "n": 1},
    ]
    inputs = json.loads(run("query", output, "select distinct input_uri from results", "--format", "json"))
    assert {i["input_uri"] for i in inputs} == {f"{small_archive}/scan 0.png", f"{small_archive}/broken.jpg"}
    record = json.loads((output / "runs" / "000002.json").read_text())
    assert record["overrides"] == {"stage2.adapter_rank": 2, "stage1.enabled": False}
    assert record["settings"]["stage2"]["adapter_rank"] == 2


def test_what_is_printed_commands_no_terminal():
    assert visible("scan\n1\x1b[31m é 日.png") == r"scan\n1\x1b[31m é 日.png"


def test_nothing_there(run, tmp_path):
    assert "nothing has been committed" in run("status", tmp_path, code=2)
    assert "nothing has been committed" in run("query", tmp_path, "select 1", code=2)
    assert "no archive at" in run("run", tmp_path / "none", tmp_path / "out", code=2)
    (tmp_path / "scan.png").touch()
    assert "no archive at" in run("run", tmp_path / "scan.png", tmp_path / "out", code=2)
    assert "no archive: write `diffcolor run ARCHIVE OUTPUT`" in run("run", code=2)
    assert "no output: write" in run("run", tmp_path, code=2)
    assert "given twice" in run("run", tmp_path, tmp_path / "out", "-o", tmp_path / "other", code=2)


def test_a_missing_archive_is_refused_before_the_slow_imports(tmp_path):
    """In less than a second on an idle machine; a busy one shows it by what has been loaded."""
    code = """
import sys
from flows.cli import app
try:
    app(["run", "/no/such/archive", sys.argv[1]])
except SystemExit as end:
    print(end.code, sorted({"torch", "prefect", "ray", "duckdb"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"
    assert done.stderr == "diffcolor: there is no archive at '/no/such/archive': give an existing folder or URL\n"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def flow_called(monkeypatch):
    """What the commands call instead of the flow: it keeps the options that they have made."""
    calls = []

    def called(name, kind, **given):
        calls.append(checked(kind, **given))

    monkeypatch.setattr("flows.cli.coloring._run_flow", called)
    return calls


def test_a_flag_counts_before_a_variable_and_a_variable_before_the_file(run, flow_called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("diffcolor.toml").write_text(
        'archive = "in-file"\noutput = "out-file"\nseed = 1\nnum_actors = 1\nlimit = 1\n[overrides]\nbatch_size = 1\n'
    )
    monkeypatch.setenv("DIFFCOLOR_SEED", "2")
    monkeypatch.setenv("DIFFCOLOR_NUM_ACTORS", "2")
    run("run", "--seed", 3, "--no-keep-fits")
    (options,) = flow_called
    assert (options.archive, options.output, options.preset) == ("in-file", "out-file", None)
    assert (options.seed, options.num_actors, options.limit, options.keep_fits) == (3, 2, 1, False)
    assert options.overrides == {"batch_size": 1}
    run("run", "in", "out", "--set", "stage2.adapter_rank=4")
    assert (flow_called[1].archive, flow_called[1].output) == ("in", "out")
    assert flow_called[1].overrides == {"stage2.adapter_rank": 4}
    run("recolor", "elsewhere", "--catalog", "c.csv")
    assert (flow_called[2].output, flow_called[2].catalog, flow_called[2].num_actors) == ("elsewhere", "c.csv", 2)
    Path("diffcolor.toml").write_text("preste = 'paper'\n")
    assert "did you mean 'preset'" in run("run", "in", "out", code=2)
    assert "did you mean 'preset'" in run("colorize", "scan.png", "--prompt", "a ball", "-o", "out", code=2)


def test_output_is_an_argument_or_an_option(run, flow_called, monkeypatch):
    run("run", "in", "-o", "out")
    monkeypatch.setenv("DIFFCOLOR_OUTPUT", "from-environment")
    run("run", "in", "out")
    run("run", "in")
    assert [options.output for options in flow_called] == ["out", "out", "from-environment"]


def test_the_demo_model_says_what_it_is_on_other_scans_than_its_own(capsys, tmp_path):
    _warn_of_demo("demo", str(Path(__file__).parents[2] / "examples/archive"))
    _warn_of_demo("someone/else", str(tmp_path))
    assert capsys.readouterr().err == ""
    _warn_of_demo("demo", str(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert "six kinds of solids" in line
    assert "--model" in line


def test_a_quiet_run_says_nothing_but_errors(run, flow_called):
    run("run", "in", "out", "--quiet")
    assert notes.quiet
    assert os.environ["PREFECT_LOGGING_LEVEL"] == "ERROR"
    assert "no archive" in run("run", "-q", code=2)
    run("run", "in", "out", "-v")
    assert not notes.quiet
    assert os.environ["PREFECT_LOGGING_LEVEL"] == "INFO"


@pytest.mark.parametrize("command", ["status", "verify", "compact", "recolor"])
def test_an_address_that_no_filesystem_knows(run, tmp_path, command):
    options = ("--catalog", tmp_path / "c.csv") if command == "recolor" else ()
    assert "bogus" in run(command, "bogus://out", *options, code=2)


def test_a_catalog_error_is_wrong_usage(run, small_archive, tiny_folder, tmp_path):
    (small_archive / "catalog.csv").write_text("image,prompt\nscan 0.png,a ball\n")
    assert "did you mean your 'prompt'" in run("run", small_archive, tmp_path / "o", "--model", tiny_folder, code=2)
    (small_archive / "catalog.csv").write_text("ima\x1b[31mge,context_prompt\x1b]0;mine\x07\nscan 0.png,a ball\n")
    assert "\x1b" not in run("run", small_archive, tmp_path / "o", "--model", tiny_folder, code=2)


def test_an_error_commands_no_terminal(run, small_archive, tiny_folder, tmp_path):
    commit_part(Store(str(tmp_path / "out")), "p", [row(image="\x1b[31m.png")])
    said = run("query", tmp_path / "out", "select image_key::int from results", code=2)
    assert r"\x1b[31m.png" in said
    assert "\x1b" not in said


def test_a_stopped_run_ends_as_stopped_even_if_prefect_has_gone_first():
    code = """
import os, signal, sys, threading, types
from flows.cli import coloring

def flow(**_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(10)
    except KeyboardInterrupt:
        raise ConnectionRefusedError("the server is gone") from None

sys.modules["flows.colorize_archive"] = types.SimpleNamespace(colorize_archive=flow)
options = {"archive": sys.argv[1], "output": sys.argv[2], "prompt": "a ball"}
try:
    coloring._run_flow("colorize_archive", coloring.RunOptions, **options)
except BaseException as error:
    raise SystemExit(error.exit_code)
"""
    examples = Path(__file__).parents[2] / "examples/archive"
    environment = os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    command = [sys.executable, "-c", code, examples, "out"]
    assert subprocess.run(command, env=environment, check=False).returncode == 128 + signal.SIGTERM
