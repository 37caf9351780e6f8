"""Each example of docs/reading.md, run as it stands there, after two compactions and beside a live run."""

import io
import re
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tasks.columns import RESULTS_SCHEMA
from tasks.compaction import compact
from tasks.layout import RESULTS
from tasks.lease import hold_output
from tasks.manifest import commit_part, publish_results, query
from tasks.storage import Store
from tests.tasks.test_manifest import row

DOC = (Path(__file__).parents[2] / "docs" / "reading.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)


@pytest.fixture
def output(tmp_path):
    return filled(Store(str(tmp_path / "out")))


def filled(store: Store) -> Store:
    """Seven images, one of which was done twice, in parts of three runs with a compaction after two of them."""
    commit_part(store, "000001-0", [row(image=f"{number}.png", generation=1) for number in range(4)])
    compact(store)
    commit_part(store, "000002-0", [row(image="0.png", generation=2, attempt=2), row(image="4.png", generation=2)])
    compact(store)
    with hold_output(store, {"run_id": "third"}, after=publish_results) as lease:
        commit_part(store, "000003-0", [row(image=f"{number}.png", generation=3) for number in (5, 6)])
        lease.end({})
    return store


def run_example(code: str, output: Store) -> int:
    """How many rows the example's `results` has."""
    local, remote = "out/demo/", "s3://museum/colorized/"
    assert (local in code) != (remote in code)
    names: dict[str, object] = {}
    exec(code.replace(local, f"{output.url}/").replace(remote, f"{output.url}/"), names)
    return len(names["results"])  # type: ignore[arg-type]


def test_every_library_is_in_the_examples():
    assert [library for library in ("pandas", "polars", "pyarrow", "duckdb") if library not in "".join(EXAMPLES)] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda code: re.sub(r"\W+", "-", code.splitlines()[0] + code[-30:]))
def test_an_example_reads_each_row_once_after_compactions_and_beside_a_live_run(request, tmp_path, example):
    output = filled(Store(request.getfixturevalue("s3_url") if "s3://" in example else str(tmp_path / "out")))
    assert run_example(example, output) == 7
    with hold_output(output, {"run_id": "live"}, after=publish_results) as lease:
        commit_part(output, "000004-0", [row(image="late.png", generation=4)])
        assert run_example(example, output) == 7
        lease.end({})
    assert run_example(example, output) == 8


def test_a_reader_never_sees_a_part_of_the_file(output):
    """Versions come one after the other, each whole."""
    ended = threading.Event()

    def write():
        for number in range(10):
            commit_part(output, f"000009-{number}", [row(image=f"new {number}.png", generation=9)])
            publish_results(output)
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    try:
        while not ended.is_set() and writer.is_alive():
            file = pq.ParquetFile(io.BytesIO(output.read(RESULTS)))
            assert file.read().num_rows == int(file.metadata.metadata[b"diffcolor.rows"])
            seen.append(file.metadata.num_rows)
    finally:
        writer.join()
    assert seen == sorted(seen)
    assert seen[0] >= 7
    assert pq.read_table(io.BytesIO(output.read(RESULTS))).num_rows == 17


def test_the_file_is_the_view_sorted_and_described(output):
    file = pq.ParquetFile(io.BytesIO(output.read(RESULTS)))
    table = file.read()
    columns = "image_key, variant, attempt, generation"
    expected = query(output, f"select {columns} from results order by image_key, variant").fetchall()
    assert [tuple(r.values()) for r in table.select(columns.split(", ")).to_pylist()] == expected
    for found, field in zip(table.schema, RESULTS_SCHEMA, strict=True):
        assert (found.name, found.type, found.metadata) == (field.name, field.type, field.metadata)
    facts = {
        key.decode(): value.decode() for key, value in file.metadata.metadata.items() if key.startswith(b"diffcolor.")
    }
    assert (facts["diffcolor.schema_version"], facts["diffcolor.rows"], facts["diffcolor.generation"]) == (
        "5",
        "7",
        "3",
    )
    assert facts["diffcolor.written_at"].endswith("+00:00")
