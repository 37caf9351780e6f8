import io
import json
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks import manifest
from tasks.columns import RESULTS_SCHEMA, SCHEMA
from tasks.compaction import compact
from tasks.errors import ManifestError
from tasks.layout import compaction, part, pointer
from tasks.lease import hold_output
from tasks.manifest import commit_part, connect, encode_part, publish_results, query
from tasks.storage import Store
from tests.conftest import ON_S3_TOO

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


@pytest.fixture
def output(store):
    return store


def test_the_schema_has_the_promised_columns_each_documented():
    added = {"input_version", "pages_left_out", "access_uri", "alpha_scores", "nouns", "generation", "output_bytes"}
    added |= {"fit_uri", "fit_bytes", "fit_reused", "adopted_from", "fallback", "access_sha256", "primary_sha256"}
    added |= {"catalog_columns", "context_is_generic", "dtype", "noun_lightness"}
    assert [name for name in SCHEMA.names if name not in added] == ISSUE_COLUMNS
    for field in SCHEMA:
        assert field.metadata[b"description"]
        if field.name.endswith(("_px", "_seconds", "_bytes", "delta_l")):
            assert field.metadata[b"unit"]


def test_a_part_keeps_types_and_documentation(tmp_path):
    (tmp_path / "p.parquet").write_bytes(encode_part([row(width_px=7)]))
    schema = pq.read_schema(tmp_path / "p.parquet")
    assert schema.equals(SCHEMA)
    assert schema.metadata[b"diffcolor.schema_version"] == b"5"
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


@ON_S3_TOO
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


@ON_S3_TOO
def test_a_query_reads_nothing_outside_the_manifest(output, tmp_path):
    commit_part(output, "p", [row()])
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    with pytest.raises(ManifestError):
        query(output, f"select * from read_csv('{secret}')").fetchall()


def test_a_part_that_cannot_be_read_is_told_with_the_remedy(output):
    commit_part(output, "p", [row()])
    commit_part(output, "q", [row()])
    output.write("manifest/q.parquet", output.read("manifest/q.parquet")[:-50])
    for ask in (lambda: query(output, "from results"), lambda: compact(output)):
        with pytest.raises(ManifestError, match="cannot be read.*diffcolor verify"):
            ask()


def test_an_output_without_manifest(output):
    with pytest.raises(ManifestError, match="nothing has been committed"):
        connect(output)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_loose", [64, 300_000])
def test_a_view_over_a_large_compacted_manifest_streams_to_its_end(tmp_path, num_loose):
    """DuckDB hangs when it streams a union of joins (duckdb/duckdb#22215), from about this size on."""
    output, images = Store(str(tmp_path)), [f"{number:07d}.png" for number in range(500_000)]

    def write_part(key, images, generation):
        columns = {
            name: pa.repeat(pa.scalar(value, SCHEMA.field(name).type), len(images))
            for name, value in row(generation=generation).items()
        }
        sink = io.BytesIO()
        pq.write_table(pa.table(columns | {"image_key": images}), sink, row_group_size=25_000)
        output.write(key, sink.getvalue())

    latest = [f"{compaction(1, 'ab')}/latest-{number:05d}.parquet" for number in range(8)]
    for number, key in enumerate(latest):
        write_part(key, images[number * 62_500 : (number + 1) * 62_500], 1)
    output.write(pointer(1), json.dumps({"latest": latest, "earlier": [], "replaced": []}).encode())
    write_part(part("p2"), images[100_000 : 100_000 + num_loose], 2)

    counts = {"results": 500_000, "outdated": num_loose, "attempts": 500_000 + num_loose}
    connection = connect(output, views=list(counts))
    for view, expected in counts.items():
        reader = connection.execute(f"select image_key, status, generation from {view}").to_arrow_reader(10_000)
        assert sum(batch.num_rows for batch in reader) == expected


def test_only_the_views_that_are_asked_for_are_made(tmp_path, monkeypatch):
    """Each reads the footers of all its parts, which costs on an object store."""
    output = Store(f"memory://{tmp_path}")
    for number in range(3):
        commit_part(output, f"p{number}", [row(image=f"{number}.png", generation=1)])
    opened = []
    store, plain = type(output.fs), type(output.fs)._open
    monkeypatch.setattr(store, "_open", lambda *args, **kwargs: opened.append(1) or plain(*args, **kwargs))

    def opened_by(**views):
        opened.clear()
        connect(output, **views)
        return len(opened)

    assert 3 <= opened_by(views=["attempts"]) < opened_by(views=["results"]) < opened_by()


@pytest.mark.parametrize("sql", ['select count(*) from "Results"', "SELECT COUNT(*) FROM RESULTS", "select 2"])
def test_a_query_finds_the_views_that_it_names(output, sql):
    for number in range(2):
        commit_part(output, f"p{number}", [row(image=f"{number}.png", generation=1)])
    assert query(output, sql).fetchall() == [(2,)]


@ON_S3_TOO
def test_results_are_published_once_for_the_same_parts(output, monkeypatch):
    commit_part(output, "p1", [row(generation=1)])
    publish_results(output)
    before = output.read("results.parquet")
    publish_results(output)
    assert output.read("results.parquet") == before  # written_at too
    commit_part(output, "p2", [row(image="b.png", generation=2)])
    compact(output)
    assert pq.read_table(io.BytesIO(output.read("results.parquet"))).num_rows == 2
    for key, _ in output.list("manifest"):
        output.delete(key)
    publish_results(output)
    assert not output.has("results.parquet")


@ON_S3_TOO
@pytest.mark.parametrize("is_open", [False, True])
def test_of_publishers_at_once_the_last_one_has_every_row(output, monkeypatch, is_open):
    """Another run commits, publishes and ends while this one writes, and is overwritten with fewer rows."""
    commit_part(output, "p1", [row(generation=1)])
    write, runs = manifest._write_results, []

    def overtaken(store, parts, digest):
        if store == output and not runs:
            runs.append("another")
            with hold_output(store, {}, after=lambda store: None if is_open else publish_results(store)) as lease:
                commit_part(store, "p2", [row(image="b.png", generation=2)])
                lease.end({})
            if is_open:
                store.delete("runs/000001.end")
        write(store, parts, digest)

    monkeypatch.setattr(manifest, "_write_results", overtaken)
    publish_results(output)
    rows = pq.read_table(io.BytesIO(output.read("results.parquet"))).num_rows
    assert rows == (1 if is_open else 2)  # a run that is open publishes when it ends


def test_a_description_has_units_and_meaning(output):
    commit_part(output, "p1", [row()])
    for question in ("describe results", " DESCRIBE attempts; "):
        answer = query(output, question)
        assert answer.columns == ["column", "type", "unit", "description", "since"]
        rows = {name: values for name, *values in answer.fetchall()}
        assert list(rows) == (RESULTS_SCHEMA if "results" in question else SCHEMA).names
        assert rows["width_px"] == ["INTEGER", "px", "Upright width.", 1]
        assert rows["catalog_columns"][3] == 4
        assert all(description for _, _, description, _ in rows.values())
    assert query(output, "select unit from columns where column_name = 'bit_depth'").fetchall() == [("bit",)]


def test_parts_of_an_older_schema_are_read_beside_new_ones(output):
    old = pa.Table.from_pylist([row()], schema=pa.schema([f for f in SCHEMA if f.metadata[b"since"] == b"1"]))
    sink = io.BytesIO()
    pq.write_table(old, sink)
    output.write("manifest/old.parquet", sink.getvalue())
    assert query(output, "select image_key, generation, fit_uri from results").fetchall() == [("a.png", None, None)]
    commit_part(output, "new", [row(attempt=2, generation=1, minutes=-5)])
    assert query(output, "select attempt from results").fetchall() == [(2,)]
