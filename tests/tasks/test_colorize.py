import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from torch._inductor.exc import InvalidCxxCompiler

from diffcolor_core import DiffColor, Settings
from diffcolor_core.config import SamplingSettings, Stage1Settings, Stage2Settings
from diffcolor_core.errors import ModelError
from support.pictures import gray_picture
from tasks.archive import CatalogRow
from tasks.colorize import ImageWorker
from tasks.columns import SCHEMA
from tasks.errors import AcceleratorFaultError
from tasks.layout import key_of
from tasks.manifest import commit_part, query
from tasks.options import RunOptions
from tasks.planning import open_plan
from tasks.records import ImageWork, PlannedImage, RunConfig, Variant
from tasks.rows import error_rows
from tasks.storage import Store
from tasks.verify import repair, verify
from tests.tasks.test_planning import with_options

QUICK = Settings(
    stage1=Stage1Settings(num_steps=1, learning_rate=1e-3),
    stage2=Stage2Settings(embedding_steps=1, model_steps=1),
    sampling=SamplingSettings(num_steps=2),
)
RED = [CatalogRow(1, "a.png", "a ball", "a red ball")]


@pytest.fixture
def config(tmp_path, tiny_folder):
    from diffcolor_core.model_files import identify

    model_id, model_revision = identify(str(tiny_folder))
    (tmp_path / "in").mkdir()
    Image.fromarray(gray_picture()).save(tmp_path / "in/a.png")
    options = RunOptions(
        archive=str(tmp_path / "in"), output=str(tmp_path / "out"), model=str(tiny_folder), access_copy="jpeg"
    )
    return RunConfig(
        options=options, run_id="r", model_id=model_id, model_revision=model_revision, settings=QUICK, generation=1
    )


def run(config, catalog=RED, **options):
    """Plan, colorize and commit as the flow does, in this process; the rows."""
    config = with_options(config, **options)
    with open_plan(catalog) as plan:
        plan.fill(config)
        images = [image for shard in plan.shards(10) for image in shard.images]
    worker = ImageWorker(config)
    rows = [row for image in images for row in worker.colorize(image)]
    if rows:
        commit_part(Store(config.options.output), f"{config.generation:06d}", rows)
    return rows


def test_a_row_keeps_the_other_columns_of_its_catalog_row(config):
    (row,) = run(config, [CatalogRow(1, "a.png", "a ball", "a red ball", '{"rights": "none"}')])
    assert row["catalog_columns"] == '{"rights": "none"}'
    read = query(Store(config.options.output), "select catalog_columns->>'rights' from results").fetchall()
    assert read == [("none",)]


def test_every_variant_keeps_the_columns_of_its_own_catalog_row(config):
    catalog = [
        CatalogRow(1, "a.png", "a ball", "a red ball", '{"id": "A 1"}'),
        CatalogRow(2, "a.png", "a ball", "a blue ball", '{"id": "A 2"}'),
    ]
    kept = {row["target_prompt"]: row["catalog_columns"] for row in run(config, catalog)}
    assert kept == {"a red ball": '{"id": "A 1"}', "a blue ball": '{"id": "A 2"}'}


def test_another_model_under_the_same_path_is_noticed_by_a_worker(config, tiny_v_folder):
    elsewhere = config.options.model_copy(update={"model": str(tiny_v_folder)})
    with pytest.raises(ModelError, match=f"not at {config.model_revision}"):
        ImageWorker(replace(config, options=elsewhere))


def documented_nulls() -> tuple[dict[str, set[str]], set[str]]:
    """Of docs/semantics.md: the null columns of each outcome, and the columns that are null for their own reason."""
    text = (Path(__file__).parents[2] / "docs/semantics.md").read_text()
    text = text.partition("### Which columns are null")[2].partition("\n## ")[0]
    groups = {name: set(re.findall(r"`(\w+)`", rest)) for name, rest in re.findall(r"- \*\*(\w+)\*\*:([^-|]*)", text)}
    outcomes = {}
    for status, why, null in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", text, re.MULTILINE):
        if status in ("ok", "quarantined", "failed"):
            named = re.findall(r"\w+", null.partition(":")[0])
            columns = set().union(*(groups.get(name, {name}) for name in named if name != "none"))
            outcomes[f"{status}: {why.partition(':')[0]}"] = columns
    own = re.findall(r"^\| (`[^|]*`) \| (?:for|unless|if|without|always)", text, re.MULTILINE)
    assert set().union(*groups.values()) <= set(SCHEMA.names)
    return outcomes, {name for names in own for name in re.findall(r"\w+", names)}


def test_the_null_columns_of_each_outcome_are_documented(config, tmp_path):
    documented, own = documented_nulls()
    (tmp_path / "in/broken.png").write_bytes(b"no picture")
    (tmp_path / "in/back\\slash.png").write_bytes(b"x")
    catalog = [
        *RED,
        CatalogRow(2, "broken.png", "a ball", "a red ball"),
        CatalogRow(3, "back\\slash.png", "a ball", "a red ball"),
        CatalogRow(4, "a.png", " and ".join(["a ball"] * 101), "a red ball"),  # more nouns than identifiers
    ]
    rows = run(config, catalog)
    by_error = {row.get("error_class"): row for row in rows}
    output = Store(config.options.output)
    output.delete(key_of(by_error[None]["output_uri"]))
    assert repair(output, list(verify(output))) == 1
    with open_plan(RED) as plan:
        plan.fill(config)
        image = next(plan.shards(10)).images[0]
    columns = ", ".join(SCHEMA.names)
    failed = query(output, f"select {columns} from results where status = 'failed'").fetchone()
    queued = dict(zip(SCHEMA.names, failed, strict=True))
    outcomes = {
        "ok: made now, or adopted from an earlier row": by_error[None],
        "quarantined: the file was not opened or not wanted": by_error["InvalidKeyError"],
        "quarantined: the file is not a readable picture": by_error["UnreadableImageError"],
        "quarantined: the context prompt cannot be used": by_error["ValueError"],
        "failed: an error that is not the image's fault; the next run tries again": error_rows(
            config, image, "failed", OSError("no route to host")
        )[0],
        "failed: queued by `verify --repair`": queued,
    }
    found = {
        outcome: {name for name in SCHEMA.names if row.get(name) is None} - own for outcome, row in outcomes.items()
    }
    assert found == documented


def test_settings_changed_back_are_adopted_and_not_computed_again(config):
    (first,) = run(replace(config, generation=1))
    run(replace(config, generation=2), seed=1)
    (third,) = run(replace(config, generation=3))
    assert (third["status"], third["adopted_from"], third["output_uri"]) == ("ok", "a.png", first["output_uri"])
    assert list(verify(Store(config.options.output))) == []
    assert run(replace(config, generation=4)) == []


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_row_whose_picture_is_not_there_any_more_is_not_adopted(config, damage):
    (first,) = run(replace(config, generation=1))
    run(replace(config, generation=2), seed=1)
    if damage == "missing":
        os.unlink(first["output_uri"])
    else:
        with open(first["output_uri"], "ab") as file:
            file.write(b"x")
    (third,) = run(replace(config, generation=3))
    assert (third["status"], third.get("adopted_from")) == ("ok", None)
    assert list(verify(Store(config.options.output))) == []


def test_every_file_of_a_row_has_its_hash(config):
    (row,) = run(replace(config, generation=1))
    for file in ("output", "access", "primary"):
        assert row[f"{file}_sha256"] == hashlib.sha256(Path(row[f"{file}_uri"]).read_bytes()).hexdigest()
    # A later run that adds a colour leaves the primary, one that adds the primary writes it anew.
    run(replace(config, generation=2), [*RED, CatalogRow(2, "a.png", "a ball", "a blue ball")])
    run(replace(config, generation=3, run_id="r3"), [*RED, CatalogRow(2, "a.png", "a ball", None)])
    assert query(Store(config.options.output), "select count(*) from results").fetchall() == [(3,)]
    assert list(verify(Store(config.options.output))) == []
    with open(row["primary_uri"], "ab") as file:
        file.write(b"x")
    assert {finding.kind for finding in verify(Store(config.options.output))} == {"changed"}


def test_files_that_cannot_be_read_are_quarantined_with_the_reason(config, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    os.symlink(tmp_path / "secret.png", tmp_path / "in/link.png")
    os.symlink(tmp_path, tmp_path / "in/folder")
    os.symlink("nothing", tmp_path / "in/dangling.png")
    os.mkfifo(tmp_path / "in/pipe.png")
    (tmp_path / "in/back\\slash.png").write_bytes(b"x")
    rows = run(replace(config, generation=1), [], prompt="a ball", limit=10)
    found = {row["image_key"]: (row["status"], row.get("error_class")) for row in rows}
    assert found.pop("a.png") == ("ok", None)
    assert found.pop("back\\slash.png") == ("quarantined", "InvalidKeyError")
    assert found == dict.fromkeys(
        ["dangling.png", "folder", "link.png", "pipe.png"], ("quarantined", "UnsafeFileError")
    )


def test_an_output_that_leads_elsewhere_is_the_machines_fault(config, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "out/images")
    with pytest.raises(PermissionError, match="elsewhere"):  # a failed row, tried again by the next run
        run(replace(config, generation=1))
    assert os.listdir(tmp_path / "elsewhere") == []


def test_keeping_and_loading_a_fit_outlasts_a_passing_trouble(config, tmp_path, monkeypatch):
    config = with_options(config, output=f"memory://{tmp_path}/out")
    troubled_once = set()

    def troubled(name):
        method = getattr(MemoryFileSystem, name)

        def call(self, path, *arguments, **options):
            if "out/fits/" in path and (name, path) not in troubled_once:
                troubled_once.add((name, path))
                raise OSError("503 Slow Down")
            return method(self, path, *arguments, **options)

        return call

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", troubled("pipe_file"))
    monkeypatch.setattr(MemoryFileSystem, "cat_file", troubled("cat_file"))
    (first,) = run(replace(config, generation=1))
    assert first["fit_reused"] is False
    fit = Store(first["fit_uri"])
    assert first["fit_bytes"] == sum(fit.size(name) for name, _ in fit.list())
    (second,) = run(replace(config, generation=2), [CatalogRow(1, "a.png", "a ball", "a blue ball")])
    assert len(troubled_once) == 4  # two files, written and read
    assert (second["fit_reused"], second["fit_bytes"]) == (True, first["fit_bytes"])


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (torch.AcceleratorError("device-side assert triggered"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), False),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False),
        (RuntimeError("the store is away"), False),
    ],
)
def test_a_fault_of_the_gpu_is_told_from_a_lack_of_memory(config, monkeypatch, error, fault):
    worker = ImageWorker(config)

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(worker.pipe, "fit", fail)
    monkeypatch.setattr(DiffColor, "fit", fail)
    planned = PlannedImage(ImageWork("a.png", "v", "a ball", (Variant("primary", None),)), (1,))
    with pytest.raises(AcceleratorFaultError if fault else type(error), match=re.escape(str(error)[:20])):
        worker.colorize(planned)


def test_the_dtype_is_in_the_row_and_if_it_was_chosen_in_the_hash(config):
    (row,) = run(config, dtype="bfloat16")
    assert row["dtype"] == "bfloat16"
    hashes = {dtype: with_options(config, dtype=dtype).fit_sha256("a") for dtype in ("auto", "float32", "bfloat16")}
    assert len(set(hashes.values())) == 3
    assert row["config_sha256"] != config.config_sha256("a ball", "a red ball")


def test_compiled_steps_are_another_fit_and_need_a_compiler(config, monkeypatch):
    asked = with_options(config, compile=True)
    assert asked.fit_sha256("a") != config.fit_sha256("a")
    calls = []
    monkeypatch.setattr(torch, "compile", lambda call: calls.append(call) or call)
    assert ImageWorker(asked).pipe.checkpoint.compiled
    assert len(calls) == 1, "it has tried the compiler"

    def broken(_):
        raise InvalidCxxCompiler

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ModelError, match="does not work on .*C\\+\\+.*leave out --compile"):
        ImageWorker(asked)
    assert not ImageWorker(config).pipe.checkpoint.compiled


def test_a_file_that_is_too_large_is_not_read(config, monkeypatch):
    monkeypatch.setattr("tasks.colorize.MAX_FILE_BYTES", 10)
    (row,) = run(config)
    assert (row["status"], row["error_class"]) == ("quarantined", "OversizeError")
    assert "bytes, the limit is 10" in row["error_message"]
