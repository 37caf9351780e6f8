"""A catalog of any bytes gives rows, or a CatalogError that names the catalog."""

import io
import json
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from tasks.archive import read_catalog
from tasks.errors import CatalogError
from tasks.storage import Store

BUDGET = settings(max_examples=200, deadline=None)
TEXT = st.text(max_size=40)
JSON = st.recursive(st.none() | TEXT | st.floats() | st.booleans(), lambda v: st.lists(v) | st.dictionaries(TEXT, v))


def read(suffix: str, data: bytes) -> None:
    archive = Store("memory://fuzz")
    archive.write(f"catalog{suffix}", data)
    with suppress(CatalogError):
        for row in read_catalog(archive, f"memory://fuzz/catalog{suffix}"):
            assert row.image
            assert row.extra is None or json.loads(row.extra.encode())


def parquet(rows: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": rows, "context_prompt": rows}), sink)
    return sink.getvalue()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@BUDGET
@given(data=st.binary(max_size=300))
def test_any_bytes(suffix, data):
    read(suffix, data)


@BUDGET
@given(rows=st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=8), place=st.integers(0, 400), noise=st.binary(max_size=8))
def test_a_damaged_csv(rows, place, noise):
    text = "image,context_prompt,target_prompt\n" + "".join(",".join(row) + "\n" for row in rows)
    data = text.encode(errors="replace")
    read(".csv", data[:place] + noise + data[place:])


@BUDGET
@given(value=JSON)
def test_any_json(value):
    read(".jsonl", json.dumps({"image": value, "context_prompt": value}).encode())
    read(".jsonl", json.dumps({"image": "a", "context_prompt": "b", "other": value}).encode())
    read(".jsonl", json.dumps(value).encode())


@BUDGET
@given(place=st.floats(0, 1), noise=st.binary(min_size=1, max_size=8))
def test_a_damaged_parquet(place, noise):
    data = parquet(["a.png", "b.png"])
    at = int(place * len(data))
    read(".parquet", data[:at] + noise + data[at + len(noise) :])


def test_json_nested_without_end():
    read(".jsonl", b"[" * 200_000)
