import hashlib
import io
import json
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.columns import SCHEMA
from tasks.compaction import compact
from tasks.errors import ManifestError, OutputBusyError
from tasks.lease import hold_output
from tasks.manifest import commit_part, list_parts, publish_results, query
from tasks.storage import Store
from tasks.verify import expire_fits, repair, verify
from tests.conftest import empty_store
from tests.tasks.test_manifest import row

KINDS = ("local loose", "local compacted", "memory loose")
ON_S3_TOO = pytest.mark.parametrize("output", [*KINDS, "s3 compacted"], indirect=True)
"""For a few tests, as S3 takes its time and what is damage does not depend on the store."""


@pytest.fixture(params=KINDS)
def output(request, tmp_path):
    """Four images in two parts, with primaries, one access copy and one fit, all as it must be."""
    kind, form = request.param.split()
    store = empty_store(kind, request, tmp_path)
    with hold_output(store, {"run_id": "r"}) as lease:
        lease.end({})
    for part in range(2):
        rows = []
        for number in (2 * part, 2 * part + 1):
            data = f"picture {number}".encode()
            stem = f"images/{number}"
            store.write(f"{stem}/target.png", data)
            store.write(f"{stem}/primary.png", b"primary")
            primary_sha256 = hashlib.sha256(b"primary").hexdigest()
            rows.append(
                row(
                    image=f"{number}.png",
                    generation=1,
                    output_uri=store.uri(f"{stem}/target.png"),
                    output_sha256=hashlib.sha256(data).hexdigest(),
                    primary_uri=store.uri(f"{stem}/primary.png"),
                    primary_sha256=primary_sha256,
                )
            )
        if part == 0:
            store.write("images/0/target.jpg", b"small")
            tensors_sha256 = hashlib.sha256(b"tensors").hexdigest()
            store.write("fits/ab/abc/fit.safetensors", b"tensors")
            store.write("fits/ab/abc/fit.json", json.dumps({"tensors_sha256": tensors_sha256}).encode())
            rows[0] |= {"access_uri": store.uri("images/0/target.jpg"), "fit_uri": store.uri("fits/ab/abc")}
            rows[0] |= {"access_sha256": hashlib.sha256(b"small").hexdigest()}
        commit_part(store, f"000001-{part}", rows)
    if form == "compacted":
        compact(store)
    return store


def found(output, **options):
    return [(f.kind, f.key) for f in verify(output, **options)]


@ON_S3_TOO
def test_an_output_as_it_must_be(output):
    assert found(output) == []


@pytest.mark.parametrize(
    "key", ["images/1/target.png", "images/1/primary.png", "images/0/target.jpg", "images/0/primary.png"]
)
def test_a_deleted_image_is_found_and_queued_again(output, key):
    output.delete(key)
    assert found(output) == [("missing", key)]
    assert repair(output, list(verify(output))) == 1
    image = key.split("/")[1] + ".png"
    assert query(output, "select image_key, error_class from results where status = 'failed'").fetchall() == [
        (image, "MissingOutputError")
    ]


@pytest.mark.parametrize("key", ["images/2/target.png", "images/2/primary.png", "images/0/target.jpg"])
def test_a_flipped_byte_is_found_and_queued_again(output, key):
    data = bytearray(output.read(key))
    data[3] ^= 1
    output.write(key, bytes(data))
    assert found(output, read_files=False) == []
    assert found(output) == [("changed", key)]
    assert repair(output, list(verify(output))) == 1
    assert output.read(f"damaged/{key}") == bytes(data)
    assert found(output) == []  # the row is failed now: the next run makes the file anew


def test_a_primary_that_a_later_run_has_written_is_checked_by_its_hash(output):
    uri = output.uri("images/2/primary.png")
    for generation, data in ((2, b"a later run's name"), (3, None)):
        hashes = {} if data is None else {"primary_sha256": hashlib.sha256(data).hexdigest()}
        picture = {
            "output_uri": output.uri("images/2/target.png"),
            "output_sha256": query(
                output, "select output_sha256 from results where image_key = '2.png' limit 1"
            ).fetchone()[0],
        }
        commit_part(
            output,
            f"p{generation}",
            [row(image="2.png", variant=f"v{generation}", generation=generation, primary_uri=uri, **picture, **hashes)],
        )
        if data:
            output.write("images/2/primary.png", data)
    assert found(output) == []


@pytest.mark.parametrize(
    ("key", "data", "kind"),
    [
        ("fits/ab/abc/fit.json", None, "missing fit"),
        ("fits/ab/abc/fit.safetensors", None, "missing fit"),
        ("fits/ab/abc/fit.safetensors", b"tensorz", "damaged fit"),
        ("fits/ab/abc/fit.json", b"{", "damaged fit"),
    ],
)
def test_a_fit_that_is_not_whole_is_found_and_given_up(output, key, data, kind):
    output.delete(key) if data is None else output.write(key, data)
    assert [f.kind for f in verify(output)] == [kind]
    assert repair(output, list(verify(output))) == 0
    assert found(output) == []
    assert [key for key, _ in output.list("fits")] == ["fits/ab/abc/expired"]


def test_a_store_in_trouble_is_not_a_damaged_part(output, monkeypatch):
    read, troubled = Store.read, []

    def read_with_trouble(self, key, **options):
        if key.endswith(".parquet"):
            troubled.append(key)
            raise OSError("503 Slow Down")
        return read(self, key, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "read", read_with_trouble)
        with pytest.raises(OSError, match="Slow Down"):
            list(verify(output))
    assert troubled


@ON_S3_TOO
def test_a_part_that_a_compaction_deletes_meanwhile_is_not_damaged(output, monkeypatch):
    read = Store.read

    def overtaken(self, key, **options):
        if key.endswith(".parquet"):
            monkeypatch.setattr(Store, "read", read)
            compact(self)
            compact(self)
        return read(self, key, **options)

    monkeypatch.setattr(Store, "read", overtaken)
    assert found(output) == []


def test_a_part_that_the_pointer_names_but_is_gone_is_found_and_forgotten(output):
    compact(output)
    (key,) = list_parts(output).latest
    output.delete(key)
    assert ("damaged part", key) in found(output)
    repair(output, list(verify(output)))
    assert key not in list_parts(output).all
    assert query(output, "select count(*) from attempts").fetchall() == [(4,)]  # from what it had replaced
    assert found(output) == []


def test_a_damaged_compacted_part_whose_originals_are_gone_costs_its_own_rows_only(output):
    compact(output, rows_per_part=2)
    for key in list_parts(output).replaced:
        output.delete(key)
    damaged, _ = list_parts(output).latest
    output.write(damaged, b"PAR1")
    repair(output, list(verify(output)))
    assert query(output, "select image_key from results order by all").fetchall() == [("2.png",), ("3.png",)]


@pytest.mark.parametrize("data", [b'{"latest": ["manif', b"[]", b"\xff"])
def test_a_pointer_that_is_damaged_hides_nothing_and_is_set_aside(output, data):
    compact(output)
    generation = list_parts(output).generation
    pointer = f"manifest/compacted-{generation:06d}.json"
    output.write(pointer, data)
    assert query(output, "select count(*) from attempts").fetchall() == [(4,)]
    assert ("damaged part", pointer) in found(output)
    repair(output, list(verify(output)))
    assert output.has(f"damaged/{pointer}")
    assert not [kind for kind, _ in found(output) if kind != "extra"]  # the parts that it named
    compact(output)
    compact(output)  # deletes them
    assert query(output, "select count(*) from attempts").fetchall() == [(4,)]
    assert found(output) == []


@pytest.mark.parametrize("table", [pa.table({"a": [1]}), pa.table({name: [1] for name in SCHEMA.names})])
def test_a_table_that_is_no_part_of_a_manifest_is_damage(output, table):
    sink = io.BytesIO()
    pq.write_table(table, sink)
    output.write("manifest/stray.parquet", sink.getvalue())
    assert found(output) == [("damaged part", "manifest/stray.parquet")]
    repair(output, list(verify(output)))
    assert found(output) == []


def test_a_link_out_of_the_output_is_a_finding(output, tmp_path):
    if not output.is_local:
        pytest.skip("only a local disk has links")
    (tmp_path / "elsewhere").write_bytes(b"picture 2")
    output.delete("images/2/target.png")
    (tmp_path / "it's out/images/2/target.png").symlink_to(tmp_path / "elsewhere")
    assert found(output) == [("changed", "images/2/target.png")]
    assert repair(output, list(verify(output))) == 1


@ON_S3_TOO
def test_damaged_results_are_found_and_written_anew(output):
    publish_results(output)
    whole = output.read("results.parquet")
    assert found(output) == []
    output.write("results.parquet", whole[: len(whole) // 2])
    assert found(output) == [("damaged results", "results.parquet")]
    assert repair(output, list(verify(output))) == 0
    assert pq.read_table(io.BytesIO(output.read("results.parquet"))).num_rows == 4
    assert found(output) == []


def test_results_show_what_a_repair_has_queued(output):
    publish_results(output)
    output.delete("images/1/target.png")
    repair(output, list(verify(output)))
    table = pq.read_table(io.BytesIO(output.read("results.parquet")))
    assert dict(zip(table["image_key"].to_pylist(), table["status"].to_pylist(), strict=True))["1.png"] == "failed"


def test_an_extra_file_is_found_and_left(output):
    output.write("images/9/target.png", b"whose?")
    extra = ["fits/ab/abc/notes", "fits/cd/cde/fit.json", "images/9/target.png", "letter.txt", "manifest/notes"]
    extra += ["manifest/sub/x.parquet", "runs/notes"]
    for key in (*extra, "letter.txt"):
        output.write(key, b"hello")
    assert found(output) == [("extra", key) for key in extra]
    assert repair(output, list(verify(output))) == 0
    assert output.has("letter.txt")


def test_a_truncated_part_is_found_and_set_aside(output):
    every = [key for key, _ in output.list("manifest") if key.endswith(".parquet")]
    keys = [key for key in every if "latest" in key] or every
    output.write(keys[0], output.read(keys[0])[:-100])
    kinds = found(output)
    assert kinds[0] == ("damaged part", keys[0])
    assert all(kind == "extra" for kind, _ in kinds[1:])  # files whose rows were in it
    repair(output, list(verify(output)))
    assert output.has(f"damaged/{keys[0]}")
    left = 4 if "compacted" in keys[0] else 2  # what a compaction has replaced is there still
    assert query(output, "select count(*) from results").fetchall() == [(left,)]


def test_a_flipped_byte_in_a_part_is_found(output):
    key = list_parts(output).all[0]
    data = bytearray(output.read(key))
    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(SCHEMA.get_field_index("target_prompt"))
    data[column.data_page_offset + column.total_compressed_size - 8] ^= 1
    output.write(key, bytes(data))
    assert ("damaged part", key) in found(output)


def test_a_row_that_is_there_twice_is_found(output):
    commit_part(output, "again", [row(image="0.png", generation=7), row(image="0.png", generation=7)])
    assert [f.detail for f in verify(output) if f.kind == "double row"] == ["2 rows of run number 7 for v"]


def test_a_moved_output_is_still_itself(output, tmp_path):
    elsewhere = Store(str(tmp_path / "elsewhere"))
    for key, _ in output.list():
        elsewhere.write(key, output.read(key))
    assert found(elsewhere) == []


def test_no_repair_under_a_running_run(output):
    output.delete("images/1/target.png")
    findings = list(verify(output))
    with hold_output(output, {"run_id": "busy"}), pytest.raises(OutputBusyError):
        repair(output, findings)


def test_without_a_manifest_there_is_nothing_to_verify(tmp_path):
    with pytest.raises(ManifestError, match="nothing has been committed"):
        list(verify(Store(str(tmp_path))))


def test_fits_expire_by_their_last_use(tmp_path):
    store, now = Store(str(tmp_path)), datetime.now(UTC)
    for name, days in (("old", 100), ("new", 1)):
        store.write(f"fits/{name}/x/fit.json", b"12345")
        values = {"finished_at": now - timedelta(days=days), "fit_uri": store.uri(f"fits/{name}/x"), "fit_bytes": 5}
        commit_part(store, name, [row(image=name, generation=1, **values)])
    assert expire_fits(store, 90).num_bytes == 5
    assert [key for key, _ in store.list("fits")] == ["fits/new/x/fit.json", "fits/old/x/expired"]
    assert expire_fits(store, 90).num_fits == 0
