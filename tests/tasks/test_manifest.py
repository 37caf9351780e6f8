from datetime import UTC, datetime, timedelta

import pyarrow.parquet as pq
import pytest

from tasks.manifest import SCHEMA, ManifestError, commit_part, connect, encode_part, latest_rows, query
from tasks.storage import Store

START = datetime(2026, 11, 22, 12, tzinfo=UTC)
ISSUE_COLUMNS = """run_id, image_key, variant, status, error_class, error_message, attempt, input_uri,
input_sha256, width_px, height_px, bit_depth, input_mode, output_uri, output_sha256, primary_uri, context_prompt,
rewritten_prompt, target_prompt, model_id, model_revision, config_sha256, seed, alpha, colorfulness, clip_similarity,
mean_abs_delta_l, p99_abs_delta_l, stage1_seconds, stage2_seconds, sampling_seconds, total_seconds, device_name,
peak_memory_bytes, node, started_at, finished_at, software_version""".replace("\n", " ").split(", ")


def row(image="a.png", variant="v", minutes=0, **values):
    now = START + timedelta(minutes=minutes)
    return {
        "run_id": "r",
        "image_key": image,
        "variant": variant,
        "status": "ok",
        "attempt": 1,
        "model_id": "demo",
        "model_revision": "1",
        "config_sha256": "c",
        "seed": 0,
        "started_at": now,
        "finished_at": now,
        "software_version": "0",
    } | values


@pytest.fixture(params=["local", "memory"])
def output(request, tmp_path):
    store = Store(str(tmp_path / "it's out") if request.param == "local" else f"memory://{tmp_path.name}")
    yield store
    if request.param == "memory" and store.exists():
        store.fs.rm(store.root, recursive=True)


def test_the_schema_has_the_promised_columns_each_documented():
    added = {"input_version", "pages_left_out", "access_uri", "alpha_scores", "nouns"}
    assert [name for name in SCHEMA.names if name not in added] == ISSUE_COLUMNS
    for field in SCHEMA:
        assert field.metadata[b"description"]
        if field.name.endswith(("_px", "_seconds", "_bytes", "delta_l")):
            assert field.metadata[b"unit"]


def test_a_part_keeps_types_and_documentation(tmp_path):
    (tmp_path / "p.parquet").write_bytes(encode_part([row(width_px=7)]))
    schema = pq.read_schema(tmp_path / "p.parquet")
    assert schema.equals(SCHEMA)
    assert schema.metadata[b"diffcolor.schema_version"] == b"1"
    assert schema.field("width_px").metadata[b"unit"] == b"px"


@pytest.mark.parametrize("bad", [{"colour": 1}, {"status": None}])
def test_a_row_that_does_not_fit_is_refused(bad):
    with pytest.raises(ValueError, match="manifest row"):
        encode_part([row() | bad])


def test_results_has_the_latest_row_of_each_variant(output):
    commit_part(output, "p1", [row(status="failed"), row(image="b.png")])
    commit_part(output, "p2", [row(minutes=1, attempt=2), row(variant="w", minutes=1)])
    found = query(output, "select image_key, variant, status, attempt from results order by all").fetchall()
    assert found == [("a.png", "v", "ok", 2), ("a.png", "w", "ok", 1), ("b.png", "v", "ok", 1)]
    assert query(output, "select count(*) from attempts").fetchall() == [(4,)]
    assert {(r["image_key"], r["variant"]) for r in latest_rows(output)} == {f[:2] for f in found}


def test_a_part_is_written_once(output):
    commit_part(output, "p", [row()])
    with pytest.raises(FileExistsError, match="another run has written it"):
        commit_part(output, "p", [row(status="failed")])
    assert query(output, "select status from results").fetchall() == [("ok",)]


@pytest.mark.parametrize(
    "sql",
    [
        "delete from results",
        "drop view results",
        "copy results to 'x.csv'",
        "select 1; select 2",
        "attach 'x.db'",
        "select nonsense from results",
        "install httpfs",
        "",
    ],
)
def test_queries_only_read(output, sql, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commit_part(output, "p", [row()])
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ManifestError):
        query(output, sql)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_query_reads_nothing_outside_the_output(tmp_path):
    output = Store(str(tmp_path / "out"))
    commit_part(output, "p", [row()])
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    with pytest.raises(ManifestError):
        query(output, f"select * from read_csv('{secret}')").fetchall()


def test_an_output_without_manifest(output):
    assert latest_rows(output) == []
    with pytest.raises(ManifestError, match="nothing has been committed"):
        connect(output)
