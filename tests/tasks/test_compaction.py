import pytest

from tasks.compaction import Compaction, compact
from tasks.errors import ManifestError
from tasks.layout import POINTER
from tasks.manifest import commit_part, connect, list_parts, query
from tasks.storage import Store
from tests.conftest import ON_S3_TOO
from tests.tasks.test_manifest import row


@pytest.fixture
def output(store):
    return store


def everything(output):
    return [query(output, f"select * exclude (nouns, alpha_scores) from {v} order by all").fetchall() for v in VIEWS]


VIEWS = ("results", "attempts")


def test_compaction_changes_no_row_and_deletes_only_what_an_earlier_one_replaced(output):
    commit_part(output, "p1", [row(status="failed", generation=1), row(image="b.png", generation=1)])
    commit_part(
        output, "p2", [row(minutes=-60, attempt=2, generation=2)]
    )  # the clock went back: the run's number counts
    assert query(output, "select attempt from results where image_key = 'a.png'").fetchall() == [(2,)]
    reader, before = connect(output), everything(output)

    assert compact(output) == Compaction(parts_before=2, parts_after=2, rows=3, deleted=0)
    assert everything(output) == before
    assert reader.sql("select count(*) from attempts").fetchall() == [(3,)]  # who opened it before still reads

    commit_part(output, "p3", [row(image="b.png", generation=3, attempt=5), row(image="c.png", generation=3)])
    after = everything(output)
    assert [len(rows) for rows in after] == [3, 5]
    assert compact(output) == Compaction(parts_before=3, parts_after=2, rows=5, deleted=2)
    assert everything(output) == after
    assert compact(output).deleted == 3  # p3, and the two parts of the first compaction
    assert everything(output) == after
    parts = list_parts(output)
    assert {key.split("-")[1] for key in (*parts.latest, *parts.earlier)} == {"000003"}
    assert {key.split("-")[1] for key in parts.replaced} == {"000002"}
    assert parts.abandoned == ()


@ON_S3_TOO
@pytest.mark.parametrize("again", [False, True])
def test_of_compactions_at_once_one_moves_the_pointer(output, monkeypatch, again):
    commit_part(output, "p1", [row(generation=1)])
    commit_part(output, "p2", [row(image="b.png", generation=1)])
    write = Store.write

    def overtaken(self, key, data):
        if self != output:  # a thread of another test
            return write(self, key, data)
        monkeypatch.setattr(Store, "write", write)
        write(self, key, data)
        compact(output)
        commit_part(output, "p3", [row(image="c.png", generation=2)])
        if again:  # deletes what the first replaced
            compact(output)
        return None

    monkeypatch.setattr(Store, "write", overtaken)
    with pytest.raises(ManifestError, match="another compaction"):
        compact(output)
    assert query(output, "select image_key from results order by 1").fetchall() == [("a.png",), ("b.png",), ("c.png",)]
    assert list_parts(output).abandoned == ()


def test_a_compaction_that_was_killed_does_not_hinder_the_next(output, monkeypatch):
    commit_part(output, "p1", [row(generation=1)])

    create = Store.create

    def killed(self, key, data):
        if self != output:  # a thread of another test
            return create(self, key, data)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", killed)
        with pytest.raises(KeyboardInterrupt):
            compact(output)
    (left,) = list_parts(output).abandoned[:1]
    before = everything(output)
    compact(output)
    compact(output)
    assert everything(output) == before
    assert not output.has(left)


def test_a_part_that_comes_while_it_is_compacted_counts_once(output, monkeypatch):
    commit_part(output, "p1", [row(generation=1)])
    create = Store.create

    def create_late(self, key, data):
        if POINTER.fullmatch(key):
            commit_part(output, "p2", [row(image="late.png", generation=1)])
        return create(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", create_late)
        compact(output)
    assert query(output, "select image_key from attempts order by all").fetchall() == [("a.png",), ("late.png",)]
