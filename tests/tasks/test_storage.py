import os
import threading
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


def test_create_has_one_winner_among_threads(store):
    won = []
    threads = [
        threading.Thread(target=lambda i=i: won.append(i) if store.create("part", b"%d" % i) else None)
        for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("part") == b"%d" % won[0]
    assert [key for key, _ in store.list()] == ["part"]
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
    assert Store("memory://probed").has_conditional_put
    assert not overwriting.has_conditional_put
    assert overwriting.list() == []


def test_create_by_claims_has_one_winner(overwriting):
    won = []
    threads = [
        threading.Thread(target=lambda i=i: won.append(i) if overwriting.create("runs/1", b"%d" % i) else None)
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert overwriting.read("runs/1") == b"%d" % won[0]
    assert [key for key, _ in overwriting.list()] == ["runs/1"]
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
    assert Store(s3_url).has_conditional_put
