import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, strategies as st

from tasks import storage
from tasks.storage import InvalidKeyError, Store, check_key, slug


def test_write_read_list(store):
    store.write("a/b.txt", b"one")
    store.write("c.txt", b"two")
    assert store.read("a/b.txt") == b"one"
    assert [key for key, _ in store.list()] == ["a/b.txt", "c.txt"]
    assert [key for key, _ in store.list("a")] == ["a/b.txt"]
    assert store.exists()
    with pytest.raises(FileNotFoundError):
        store.read("nothing")


def test_create_has_one_winner(store):
    assert store.create("part", b"first")
    assert not store.create("part", b"second")
    assert store.read("part") == b"first"


def race(store, key, num_threads):
    """Threads that create `key` all at once, one of which must win; what they leave is their bytes alone."""
    with ThreadPoolExecutor(num_threads) as threads:
        won = list(threads.map(lambda i: store.create(key, b"%d" % i), range(num_threads)))
    assert sum(won) == 1
    assert store.read(key) == b"%d" % won.index(True)
    assert [found for found, _ in store.list()] == [key]


def test_create_has_one_winner_among_threads(store):
    race(store, "part", 16)
    if store.is_local:
        assert os.listdir(f"{store.root}/.tmp") == []


class OverwritingFileSystem(MemoryFileSystem):
    """A store that ignores the condition of a PUT."""

    protocol = "overwriting"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def pipe_file(self, path, value, mode="overwrite", **options):
        super().pipe_file(path, value, mode="overwrite", **options)


@pytest.fixture
def overwriting(monkeypatch):
    monkeypatch.setattr(storage, "CLAIM_SECONDS", 0.2)
    fsspec.register_implementation("overwriting", OverwritingFileSystem, clobber=True)
    store = Store("overwriting://archive")
    yield store
    OverwritingFileSystem.store.clear()


def test_the_probe_tells_who_has_conditional_puts(overwriting):
    assert Store("memory://probed").probe_conditional_put()
    assert not overwriting.probe_conditional_put()
    assert overwriting.list() == []


def test_a_store_is_probed_once(monkeypatch):
    probes = []
    monkeypatch.setattr(Store, "probe_conditional_put", lambda self: probes.append(self.url) or True)
    for number in range(3):
        assert Store("memory://probed-once").create(f"part-{number}", b"")
    assert probes == ["memory://probed-once"]


def test_a_probe_outlasts_a_passing_trouble(monkeypatch):
    store, calls = Store("memory://probed-with-trouble"), []
    put = MemoryFileSystem.pipe_file

    def troubled(self, path, value, mode="overwrite", **options):
        if "probed-with-trouble" in path:  # not what threads of other tests write
            calls.append(mode)
            if len(calls) in (1, 3):
                raise OSError("503 Slow Down")
        return put(self, path, value, mode=mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", troubled)
    assert store.probe_conditional_put()
    assert calls == ["overwrite", "overwrite", "create", "create"]


def test_create_by_claims_has_one_winner(overwriting):
    race(overwriting, "runs/1", 8)
    assert not overwriting.create("runs/1", b"late")


def test_the_claim_of_a_killed_process_does_not_stand_for_ever(overwriting):
    overwriting.write("runs/1.claim-0000", b"")
    assert overwriting.create("runs/1", b"mine")
    assert [key for key, _ in overwriting.list()] == ["runs/1"]


def test_the_version_changes_with_the_content(tmp_path):
    store = Store(str(tmp_path))
    store.write("a", b"one")
    os.utime(tmp_path / "a", ns=(1, 1))
    before = dict(store.list())["a"]
    store.write("a", b"three")
    assert dict(store.list())["a"] != before


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a\0b", "a\\b", "x" * 1025])
def test_keys_cannot_leave_the_root(tmp_path, key):
    store = Store(str(tmp_path))
    for call in (store.read, store.uri, lambda k: store.write(k, b""), lambda k: store.create(k, b"")):
        with pytest.raises(InvalidKeyError):
            call(key)


@given(st.text(max_size=200))
def test_a_slug_is_always_a_safe_part_of_a_key(text):
    part = slug(text)
    assert check_key(part) == part
    assert len(part) <= 60
    assert part.isascii()
    assert "/" not in part
    assert not part.startswith(".")


def test_what_an_object_store_calls_a_key(s3_url):
    assert Store(s3_url).uri("a.png") == f"{s3_url}/a.png"
    assert Store(s3_url).probe_conditional_put()
