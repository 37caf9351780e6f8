import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterParentFlowRunId
from prefect.states import Running

from diffcolor_core import config, read_scan
from flows.colorize_archive import colorize_archive
from flows.recolor_archive import recolor_archive
from support.pictures import gray_picture
from tasks.errors import ManifestError, OutputBusyError
from tasks.lease import hold_output
from tasks.manifest import query
from tasks.options import RunOptions, flow_arguments
from tasks.runs import open_run
from tasks.storage import Store
from tasks.verify import verify

PHOTO = config.PRESETS["photo"]  # before the tests replace it


def files(folder: Path) -> set[str]:
    """Every file of an output, except those of its report."""
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    return {name for name in found if not name.startswith("report/")}


@pytest.fixture
def empty_archive(tmp_path: Path) -> Path:
    """A run over it needs no actor."""
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def ask(output: Path, sql: str) -> list[tuple]:
    return query(Store(str(output)), sql).fetchall()


def test_an_archive_end_to_end(small_archive, tiny_folder, tmp_path):
    num_shards = 3  # of 2, 1 and 1 images: the last are small, so that no actor waits for another
    output = tmp_path / "out"
    arguments = {
        "archive": str(small_archive),
        "output": str(output),
        "model": str(tiny_folder),
        "options": {"num_actors": 2, "shard_size": 2},
    }
    summary = colorize_archive(**arguments)
    assert summary == {"ok": 4, "quarantined": 1, "failed": 0, "done_before": 0}

    rows = ask(output, "select image_key, variant, status, error_class, target_prompt from results order by all")
    assert [(key, status, error, target) for key, _, status, error, target in rows] == [
        ("broken.jpg", "quarantined", "UnreadableImageError", "a red cone on a table"),
        *sorted(
            [
                ("scan 0.png", "ok", None, "a red ball on a green table"),
                ("scan 0.png", "ok", None, "a blue ball on a green table"),
            ],
            key=lambda r: next(v for k, v, *_, t in rows if t == r[3]),
        ),
        ("scan 1.png", "ok", None, "a yellow box on a blue table"),
        ("scan 2.png", "ok", None, None),
    ]
    kept = ask(
        output, "select image_key, target_prompt, catalog_columns from results where catalog_columns is not null"
    )
    assert sorted(kept) == [
        ("scan 0.png", "a blue ball on a green table", '{"source": "somewhere"}'),
        ("scan 0.png", "a red ball on a green table", '{"source": "somewhere else"}'),
    ]
    # one part per shard, one picture per variant, one primary and one fit per image, the run's record and its end
    found = files(output)
    assert sum(f.startswith("manifest/") for f in found) == num_shards
    assert {f for f in found if f.startswith("runs/")} == {"runs/000001.json", "runs/000001.end"}
    pictures = {f for f in found if f.startswith("images/")}
    assert sum("/target-" in f for f in pictures) == 3
    assert sum("/primary-" in f for f in pictures) == 3
    assert sum(f.startswith("fits/") for f in found) == 2 * 3
    assert len(found) == num_shards + 2 + 6 + 6 + 1  # and results.parquet
    assert pq.read_table(output / "results.parquet").num_rows == 5

    for key, uri, sha256, primary, p99 in ask(
        output,
        "select image_key, output_uri, output_sha256, primary_uri, p99_abs_delta_l from results where status='ok'",
    ):
        data = Path(uri).read_bytes()
        assert hashlib.sha256(data).hexdigest() == sha256
        assert Path(primary).is_file()
        scan, again = read_scan(small_archive / key), read_scan(data)
        delta = (scan.lightness - again.lightness).abs().numpy()
        assert np.percentile(delta, 99) == pytest.approx(p99, abs=1e-3)
        assert p99 <= 0.5
    # what every ok row must tell
    empty = ask(
        output,
        """select count(*) from results where status = 'ok' and (input_sha256 is null or width_px <> 56
           or height_px <> 40 or bit_depth <> 8 or rewritten_prompt is null or stage1_seconds is null
           or total_seconds < stage1_seconds + stage2_seconds or peak_memory_bytes < 1e7 or node is null
           or finished_at < started_at or colorfulness is null or clip_similarity is null)""",
    )
    assert empty == [(0,)]

    # the same again: nothing is done, nothing is written
    published = (output / "results.parquet").stat().st_mtime_ns
    assert colorize_archive(**arguments) == {"ok": 4, "quarantined": 1, "failed": 0, "done_before": 5}
    assert files(output) == found
    assert (output / "results.parquet").stat().st_mtime_ns == published

    # one more prompt: that alone
    with (small_archive / "catalog.csv").open("a") as file:
        file.write("scan 1.png,a box on a table,a white box on a red table,\n")
    assert colorize_archive(**arguments) == {"ok": 5, "quarantined": 1, "failed": 0, "done_before": 5}
    assert len(files(output) - found) == 4  # part, the run's record and end, picture
    assert ask(output, "select count(*) from attempts where fit_reused") == [(1,)]


def test_an_archive_without_captions_is_coloured_all_the_same(tmp_path, monkeypatch):
    """With the bundled model for photographs and its own preset, as a stranger's first run has it."""
    monkeypatch.setitem(config.PRESETS, "photo", PHOTO)
    archive, output = tmp_path / "scans", tmp_path / "out"
    archive.mkdir()
    Image.fromarray(gray_picture(120, 90)).save(archive / "one.png")
    assert colorize_archive(str(archive), str(output))["ok"] == 1
    rows = ask(output, "select model_id, context_prompt, context_is_generic, status, colorfulness from results")
    assert [row[:4] for row in rows] == [("photo", "a photograph", True, "ok")]
    assert rows[0][4] > 1  # it is not gray


@pytest.mark.usefixtures("without_actors")
def test_a_renamed_or_touched_image_is_not_coloured_again_and_a_changed_one_is(small_archive, tiny_folder, tmp_path):
    output = tmp_path / "out"
    arguments = {"archive": str(small_archive), "output": str(output), "model": str(tiny_folder)}
    colorize_archive(**arguments)
    before = {f: (output / f).stat().st_mtime_ns for f in files(output)}
    os.rename(small_archive / "scan 1.png", small_archive / "renamed.png")
    os.utime(small_archive / "scan 0.png", ns=(1, 1))
    catalog = small_archive / "catalog.csv"
    catalog.write_text(catalog.read_text().replace("scan 1.png", "renamed.png"))
    Image.fromarray(np.full((40, 56), 99, np.uint8)).save(small_archive / "scan 2.png")
    assert colorize_archive(**arguments) == {"ok": 4, "quarantined": 1, "failed": 0, "done_before": 1}
    made = [f.split("/")[0] for f in files(output) if before.get(f) != (output / f).stat().st_mtime_ns]
    assert Counter(made) == {"manifest": 1, "runs": 2, "results.parquet": 1, "images": 1, "fits": 2}
    rows = ask(
        output,
        """select image_key, adopted_from, output_sha256 = (
            select any_value(output_sha256) from attempts a where a.target_prompt = r.target_prompt and generation = 1)
        from results r where generation = 2 order by all""",
    )
    assert rows == [
        ("renamed.png", "scan 1.png", True),
        ("scan 0.png", "scan 0.png", True),
        ("scan 0.png", "scan 0.png", True),
        ("scan 2.png", None, None),
    ]


def test_of_two_runs_on_one_output_the_second_is_refused(small_archive, tiny_folder, tmp_path):
    arguments = {"archive": str(small_archive), "output": str(tmp_path / "out"), "model": str(tiny_folder)}
    with (
        hold_output(Store(str(tmp_path / "out")), {"run_id": "the first"}),
        pytest.raises(OutputBusyError, match="'the first'"),
    ):
        colorize_archive(**arguments)
    assert not (tmp_path / "out" / "manifest").exists()


def test_more_shards_than_a_flow_run_should_hold_are_given_to_child_flows(
    small_archive, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("flows.colorize_archive.MAX_TASK_RUNS", 2)
    arguments = {"archive": str(small_archive), "output": str(tmp_path / "out"), "model": str(tiny_folder)}
    more_than_cores = {"num_actors": 3, "shard_size": 1}
    state = colorize_archive(**arguments, options=more_than_cores, return_state=True)
    assert state.result() == {"ok": 4, "quarantined": 1, "failed": 0, "done_before": 0}
    with get_client(sync_client=True) as client:
        parent = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[state.state_details.flow_run_id]))
        ranges = client.read_flow_runs(flow_run_filter=parent)
        held = [
            len(client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))))
            for run in ranges
        ]
    assert held == [2, 2]


def test_prefect_hears_of_a_run_whose_process_was_killed(empty_archive, tiny_folder, tmp_path):
    output = Store(str(tmp_path / "out"))
    with get_client(sync_client=True) as client:
        zombie = client.create_flow_run(colorize_archive, state=Running())
        with hold_output(output, {"run_id": "killed", "flow_run_id": str(zombie.id)}) as lease:
            lease.end({})
        record = json.loads(output.read("runs/000001.json"))
        output.write("runs/000001.json", json.dumps(record | {"process_started": 1.0}).encode())
        output.delete("runs/000001.end")
        colorize_archive(archive=str(empty_archive), output=output.url, model=str(tiny_folder))
        assert client.read_flow_run(zombie.id).state.is_crashed()


def test_more_gpus_than_there_are_is_an_error_and_not_a_wait(small_archive, tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="2 actors with 1 GPUs each need more than the 0 GPUs"):
        colorize_archive(
            str(small_archive),
            str(tmp_path / "out"),
            model=str(tiny_folder),
            options={"num_actors": 2, "gpus_per_actor": 1},
        )


def test_after_a_fault_of_the_gpu_its_process_ends_and_the_image_is_tried_again(
    small_archive, tiny_folder, tmp_path, monkeypatch, caplog
):
    from tasks import actors
    from tests.flows.faulty import FaultyAcceleratorWorker

    output = tmp_path / "out"
    monkeypatch.setattr(actors, "ImageWorker", FaultyAcceleratorWorker)
    summary = colorize_archive(str(small_archive), str(output), model=str(tiny_folder), options={"max_attempts": 2})
    (gone,) = [line for line in caplog.messages if line.startswith("the worker of ")]
    assert gone.startswith("the worker of scan 1.png is gone: its GPU failed: CUDA error: an illegal memory access was")
    assert "Compile" not in gone
    assert summary == {"ok": 4, "quarantined": 1, "failed": 0, "done_before": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"archive": "/no/such/folder"}, "no archive at"),
        ({"model": "someone/model"}, "pinned revision"),
        ({"options": {"overrides": {"stage2.rank": 4}}}, "no setting 'stage2.rank'"),
        ({"catalog": "/no/catalog.csv"}, "no catalog at"),
    ],
)
def test_a_run_that_cannot_start_says_why(small_archive, tiny_folder, tmp_path, change, message):
    arguments = {"archive": str(small_archive), "output": str(tmp_path / "out"), "model": str(tiny_folder)} | change
    with pytest.raises((ValueError, OSError), match=message):
        colorize_archive(**arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_actors")
def test_tiffs_with_access_copies_and_new_colours_from_the_kept_fits(small_archive, tiny_folder, tmp_path):
    output = tmp_path / "out"
    pictures = {"image_format": "tiff", "access_copy": "jpeg"}
    colorize_archive(str(small_archive), str(output), model=str(tiny_folder), options=pictures)
    rows = ask(
        output,
        """select output_uri, access_uri, nouns, pages_left_out, noun_lightness from results where status = 'ok'
        order by image_key""",
    )
    for output_uri, access_uri, nouns, pages_left_out, lightness in rows:
        assert output_uri.endswith(".tif")
        with Image.open(access_uri) as image:
            assert image.format == "JPEG"
        assert all(-1 <= noun["agreement"] <= 1 for noun in nouns)
        assert all(0 < light < 100 for light in lightness)
        assert len(lightness) == len(nouns)
        assert pages_left_out == 0
    assert [noun["noun"] for noun in rows[0][2]] == ["ball", "table"]

    targets = tmp_path / "targets.csv"
    targets.write_text("image,target_prompt\nscan 0.png,a white ball on a red table\nscan 1.png,a red box on a table\n")
    arguments = {"output": str(output), "catalog": str(targets)}
    assert recolor_archive(**arguments) == {"ok": 2, "quarantined": 0, "failed": 0, "done_before": 0}
    rows = ask(
        output,
        """select image_key, context_prompt, target_prompt, fit_reused, right(output_uri, 4) from results
        where generation = 2 order by image_key""",
    )
    assert rows == [
        ("scan 0.png", "a ball on a table", "a white ball on a red table", True, ".tif"),
        ("scan 1.png", "a box on a table", "a red box on a table", True, ".tif"),
    ]
    assert list(verify(Store(str(output)))) == []

    # a fit that is gone is made again, and a damaged one too
    gone, damaged = (Path(uri) for (uri,) in ask(output, "select fit_uri from results where generation = 2"))
    shutil.rmtree(gone)
    tensors = damaged / "fit.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-9])
    targets.write_text(
        "image,target_prompt\nscan 0.png,a purple ball on a red table\nscan 1.png,a blue box on a table\n"
    )
    assert recolor_archive(**arguments)["ok"] == 2
    assert ask(output, "select fit_reused from results where generation = 3") == [(False,), (False,)]
    assert list(verify(Store(str(output)))) == []


def test_recolouring_needs_a_run_to_go_by(tmp_path):
    (tmp_path / "targets.csv").write_text("image,target_prompt\na.png,a red ball\n")
    with pytest.raises(ManifestError, match="no run has been recorded"):
        recolor_archive(output=str(tmp_path / "out"), catalog=str(tmp_path / "targets.csv"))


def test_a_run_that_is_open_is_not_prepared_again(empty_archive, tiny_folder, tmp_path, monkeypatch):
    """As a command does: it checks what it is asked for, and the flow goes on with what has been read."""
    options = RunOptions(archive=str(empty_archive), output=str(tmp_path / "out"), model=str(tiny_folder))
    with open_run(options):
        monkeypatch.setattr("diffcolor_core.model_files.identify", None)
        monkeypatch.setattr("tasks.runs.read_catalog", None)
        monkeypatch.setattr("tasks.runs.settings_preset", None)
        assert colorize_archive(**flow_arguments(options))["done_before"] == 0
    with pytest.raises(TypeError):
        colorize_archive(**flow_arguments(options))
