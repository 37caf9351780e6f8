import hashlib
import io
from datetime import UTC, datetime, timedelta

import pyarrow.parquet as pq
import pytest

from tasks.lease import OutputBusyError, hold_output
from tasks.manifest import SCHEMA, ManifestError, commit_part, compact, list_parts, query
from tasks.storage import Store
from tasks.verify import expire_fits, key_of, repair, verify
from tests.tasks.test_manifest import row


@pytest.fixture(params=["loose", "compacted"])
def output(request, store):
    """Four images in two parts, with primaries, one access copy and one fit, all as it must be."""
    with hold_output(store, {"run_id": "r"}) as lease:
        lease.end({})
    for part in range(2):
        rows = []
        for number in (2 * part, 2 * part + 1):
            data = f"picture {number}".encode()
            stem = f"images/{number}"
            store.write(f"{stem}/target.png", data)
            store.write(f"{stem}/primary.png", b"primary")
            rows.append(
                row(
                    image=f"{number}.png",
                    generation=1,
                    output_uri=store.uri(f"{stem}/target.png"),
                    output_sha256=hashlib.sha256(data).hexdigest(),
                    primary_uri=store.uri(f"{stem}/primary.png"),
                )
            )
        if part == 0:
            store.write("images/0/target.jpg", b"small")
            store.write("fits/ab/abc/fit.json", b"{}")
            rows[0] |= {"access_uri": store.uri("images/0/target.jpg"), "fit_uri": store.uri("fits/ab/abc")}
        commit_part(store, f"000001-{part}", rows)
    if request.param == "compacted":
        compact(store)
    return store


def found(output, **options):
    return [(f.kind, f.key) for f in verify(output, **options)]


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


def test_a_flipped_byte_is_found_and_queued_again(output):
    data = bytearray(output.read("images/2/target.png"))
    data[3] ^= 1
    output.write("images/2/target.png", bytes(data))
    assert found(output, read_files=False) == []
    assert found(output) == [("changed", "images/2/target.png")]
    assert repair(output, list(verify(output))) == 1


def test_an_extra_file_is_found_and_left(output):
    output.write("images/9/target.png", b"whose?")
    output.write("fits/cd/cde/fit.json", b"{}")
    output.write("letter.txt", b"hello")
    assert found(output) == [
        ("extra", "fits/cd/cde/fit.json"),
        ("extra", "images/9/target.png"),
        ("extra", "letter.txt"),
    ]
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
    left = 0 if "compacted" in keys[0] else 2
    try:
        assert query(output, "select count(*) from results").fetchall() == [(left,)]
    except ManifestError:
        assert left == 0


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


@pytest.mark.parametrize(
    ("uri", "key"),
    [
        ("/a/images/out/images/x-1/p.png", "images/x-1/p.png"),
        ("s3://bucket/run/fits/ab/c", "fits/ab/c"),
    ],
)
def test_the_key_in_a_uri(uri, key):
    assert key_of(uri) == key


def test_fits_expire_by_their_last_use(tmp_path):
    store, now = Store(str(tmp_path)), datetime.now(UTC)
    for name, days in (("old", 100), ("new", 1)):
        store.write(f"fits/{name}/x/fit.json", b"12345")
        values = {"finished_at": now - timedelta(days=days), "fit_uri": store.uri(f"fits/{name}/x"), "fit_bytes": 5}
        commit_part(store, name, [row(image=name, generation=1, **values)])
    assert expire_fits(store, 90).num_bytes == 5
    assert [key for key, _ in store.list("fits")] == ["fits/new/x/fit.json"]
    assert expire_fits(store, 90).num_fits == 0
