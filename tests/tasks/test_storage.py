import os
import threading

import pytest
from hypothesis import given, strategies as st

from tasks.storage import InvalidKeyError, Store, check_key, slug


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    url = str(tmp_path / "out") if request.param == "local" else f"memory://{tmp_path.name}"
    store = Store(url)
    yield store
    if request.param == "memory":
        store.fs.rm(store.root, recursive=True)


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


def test_create_has_one_winner_among_threads(tmp_path):
    store, won = Store(str(tmp_path)), []
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
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".tmp", "part"]  # no temporary file is left


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


def test_s3_by_a_mock(monkeypatch):
    """The conditional PUT as s3fs does it. (moto is a mock: the real server comes with the fault suite.)"""
    server_module = pytest.importorskip("moto.server")
    import boto3

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    try:
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="archive")
        store = Store("s3://archive/run")
        assert store.create("manifest/part.parquet", b"first")
        assert not store.create("manifest/part.parquet", b"second")
        assert store.read("manifest/part.parquet") == b"first"
        assert [key for key, _ in store.list()] == ["manifest/part.parquet"]
        assert store.uri("a.png") == "s3://archive/run/a.png"
    finally:
        server.stop()
