import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, strategies as st

from tasks import storage
from tasks.errors import InvalidKeyError, UnsafeFileError
from tasks.layout import slug
from tasks.storage import Store, check_key


def test_write_read_list(store):
    store.write("a/b.txt", b"one")
    store.write("c.txt", b"two")
    assert store.read("a/b.txt") == b"one"
    assert [key for key, _ in store.list()] == ["a/b.txt", "c.txt"]
    assert [key for key, _ in store.list("a")] == ["a/b.txt"]
    assert store.exists()
    with pytest.raises(FileNotFoundError):
        store.read("nothing")


def test_a_store_that_refuses_the_credentials_is_named_with_its_own_word(s3_url, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        with pytest.raises(PermissionError, match=rf"'{s3_url}' refuses a request .*SignatureDoesNotMatch.*clock"):
            Store(s3_url).write("a.txt", b"one")
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()


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


def test_a_name_that_is_not_unicode_is_listed_escaped(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"bad\xff.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("this disk has Unicode names only")
    store = Store(str(tmp_path))
    ((key, _),) = store.list()
    assert key == "bad\\udcff.png"
    with pytest.raises(InvalidKeyError, match="rename the file"):
        store.read(key)
    with pytest.raises(InvalidKeyError):
        store.read("bad\udcff.png")


def test_links_do_not_lead_out_of_the_root(tmp_path):
    elsewhere, store = tmp_path / "elsewhere", Store(str(tmp_path / "out"))
    elsewhere.mkdir()
    (elsewhere / "secret").write_bytes(b"secret")
    store.write("here/a", b"a")
    for name, target in (("images", elsewhere), ("link.png", elsewhere / "secret"), ("inside", f"{store.root}/here")):
        os.symlink(target, f"{store.root}/{name}")
    for call in (store.read, store.open, lambda k: store.write(k, b""), lambda k: store.create(k, b""), store.delete):
        for key in ("link.png", "images/secret"):
            with pytest.raises(UnsafeFileError, match="elsewhere"):
                call(key)
    assert os.listdir(elsewhere) == ["secret"]
    assert (elsewhere / "secret").read_bytes() == b"secret"
    assert store.read("inside/a") == b"a"
    assert [key for key, _ in store.list()] == ["here/a", "images", "inside", "link.png"]


def test_temporary_files_do_not_leave_the_root(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "out/.tmp")
    with pytest.raises(UnsafeFileError):
        Store(str(tmp_path / "out")).write("a", b"")


def test_what_is_no_file_is_not_read(tmp_path):
    store = Store(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nothing", tmp_path / "dangling")
    os.symlink("loop", tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    os.symlink("folder", tmp_path / "to-folder")
    assert [key for key, _ in store.list()] == ["dangling", "loop", "pipe", "to-folder"]
    for key in ("dangling", "loop", "pipe", "to-folder", "folder"):
        with pytest.raises(UnsafeFileError, match=key):
            store.read(key)
    with pytest.raises(FileNotFoundError):
        store.read("nothing")


def test_a_folder_is_listed_without_holding_it_in_memory(tmp_path, monkeypatch):
    store, stats = Store(str(tmp_path)), []
    for number in range(20):
        store.write(f"{number}", b"")
    info = storage._local_info
    monkeypatch.setattr(storage, "_local_info", lambda entry: stats.append(entry.name) or info(entry))
    next(store.walk())
    assert len(stats) < 20


def test_a_file_that_vanishes_while_it_is_listed_is_left_out(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    store.write("a", b"")
    store.write("b", b"")
    info = storage._local_info

    def after_the_deletion(entry):
        if entry.name == "a":
            os.unlink(entry.path)
        return info(entry)

    monkeypatch.setattr(storage, "_local_info", after_the_deletion)
    assert [key for key, _ in store.list()] == ["b"]


def test_the_probes_of_dead_processes_are_swept():
    store = Store("memory://swept")
    assert store.sweep() == 0
    for key in ("probe-old", "probe-new", "a"):
        store.write(key, b"probe")
    store.fs.store["/swept/probe-old"].modified -= storage.PROBE_LIFE * 2
    store.fs.store["/swept/a"].modified -= storage.PROBE_LIFE * 2
    assert store.sweep() == 1
    assert [key for key, _ in store.list()] == ["a", "probe-new"]


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
