import hashlib
import io
import json
import threading

import pyarrow.parquet as pq
import pytest

from tasks.approvals import RefusedChoicesError, apply_choices, read_choices
from tasks.columns import RESULTS_SCHEMA
from tasks.compaction import compact
from tasks.errors import ChoicesError, ManifestError
from tasks.layout import RESULTS, approval
from tasks.manifest import commit_part, list_approvals, publish_results, query
from tasks.storage import Store
from tasks.verify import repair, verify
from tests.conftest import ON_S3_TOO
from tests.tasks.test_manifest import row

NOON = "2026-11-25T12:00:00Z"


def sha256(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


@pytest.fixture
def output(store):
    """Two variants of one image and one of another, and an image that is quarantined."""
    rows = [row("a.png", v, generation=1, output_sha256=sha256(f"a {v}")) for v in ("target-1", "target-2")]
    rows += [row("b.png", "target-1", generation=1, output_sha256=sha256("b target-1"))]
    rows += [row("bad.png", "target-1", generation=1, status="quarantined", error_class="E", error_message="bad")]
    commit_part(store, "000001-0", rows)
    publish_results(store)
    return store


def record(*choices, who="Ada", saved=NOON, **changes):
    """A file of choices, each given as (image, variant, choice, note) with the hash that the picture has."""
    entries = [
        {"image": i, "variant": v, "sha256": sha256(f"{i[0]} {v}"), "choice": choice, "note": note}
        for i, v, choice, note in choices
    ]
    return {"schema": 1, "who": who, "saved": saved, "choices": entries} | changes


def apply(output, tmp_path, *choices, **changes):
    path = tmp_path / "choices.json"
    path.write_text(json.dumps(record(*choices, **changes)))
    return apply_choices(output, read_choices(str(path)))


def chosen(output):
    sql = "select image_key, variant, choice, choice_note, choice_by from results where choice is not null order by all"
    return query(output, sql).fetchall()


APPROVED = ("a.png", "target-1", "approved", "the coat's red is right")
REJECTED = ("b.png", "target-1", "rejected", "")


@ON_S3_TOO
def test_choices_are_in_the_view_and_in_the_published_results(output, tmp_path):
    assert apply(output, tmp_path, APPROVED, REJECTED) == 2
    assert chosen(output) == [
        ("a.png", "target-1", "approved", "the coat's red is right", "Ada"),
        ("b.png", "target-1", "rejected", "", "Ada"),
    ]
    table = pq.read_table(io.BytesIO(output.read(RESULTS)))
    assert table.schema.names == RESULTS_SCHEMA.names
    assert table["choice"].to_pylist() == ["approved", None, "rejected", None]
    assert str(table["choice_at"][0]) == "2026-11-25 12:00:00+00:00"
    described = {name: text for name, _, _, text, _ in query(output, "describe approvals").fetchall()}
    assert list(described)[:4] == ["image_key", "variant", "output_sha256", "choice"]
    assert described["choice"].startswith("What a person has decided")


def test_a_file_that_is_applied_again_changes_nothing(output, tmp_path):
    apply(output, tmp_path, APPROVED)
    before = {key: output.read(key) for key, _ in output.walk()}
    assert apply(output, tmp_path, APPROVED) == 0
    assert {key: output.read(key) for key, _ in output.walk()} == before
    assert apply(output, tmp_path, APPROVED, REJECTED) == 1  # only what is new in it
    assert query(output, "select count(*) from approvals").fetchall() == [(2,)]


def test_all_are_kept_and_the_one_saved_last_counts(output, tmp_path):
    late = ("a.png", "target-1", "rejected", "too dark")
    apply(output, tmp_path, late, saved="2026-11-25T14:00:00+01:00", who="Bo")  # 13:00 UTC
    apply(output, tmp_path, APPROVED, saved=NOON)
    assert chosen(output) == [("a.png", "target-1", "rejected", "too dark", "Bo")]
    same_time = ("a.png", "target-1", "approved", "looked again")
    apply(output, tmp_path, same_time, saved="2026-11-25T13:00:00Z")  # then the one committed last
    assert chosen(output) == [("a.png", "target-1", "approved", "looked again", "Ada")]
    assert query(output, "select count(*) from approvals").fetchall() == [(3,)]


def test_one_wrong_choice_refuses_the_whole_file_and_each_is_told(output, tmp_path):
    wrong = record(
        APPROVED,
        ("c.png", "target-1", "approved", ""),
        ("a.png", "target-9", "approved", ""),
        ("bad.png", "target-1", "approved", ""),
        ("a.png", "target-2", "approved", ""),
    )
    wrong["choices"][4]["sha256"] = sha256("another picture")
    (tmp_path / "choices.json").write_text(json.dumps(wrong))
    with pytest.raises(RefusedChoicesError, match="4 of 5 choices") as caught:
        apply_choices(output, read_choices(str(tmp_path / "choices.json")))
    assert [(r.number, r.image, r.variant) for r in caught.value.refusals] == [
        (2, "c.png", "target-1"),
        (3, "a.png", "target-9"),
        (4, "bad.png", "target-1"),
        (5, "a.png", "target-2"),
    ]
    reasons = [r.reason for r in caught.value.refusals]
    assert [words in reason for words, reason in zip(("image", "variant", "quarantined", "now"), reasons, strict=True)]
    assert sha256("a target-2") in reasons[3]
    assert list_approvals(output) == ()


def test_a_choice_ends_with_the_picture_that_it_is_about(output, tmp_path):
    apply(output, tmp_path, APPROVED)
    commit_part(output, "000002-0", [row("a.png", "target-1", generation=2, output_sha256=sha256("done again"))])
    assert chosen(output) == []
    with pytest.raises(RefusedChoicesError):
        apply(output, tmp_path, APPROVED, saved="2026-11-26T12:00:00Z")
    commit_part(output, "000003-0", [row("a.png", "target-1", generation=3, output_sha256=sha256("a target-1"))])
    assert [found[:3] for found in chosen(output)] == [APPROVED[:3]]


def test_compaction_leaves_choices_alone(output, tmp_path):
    apply(output, tmp_path, APPROVED)
    compact(output)
    compact(output)
    assert [found[:3] for found in chosen(output)] == [APPROVED[:3]]
    attempts = query(output, "from attempts")
    assert "choice" not in attempts.columns
    assert not [f for f in verify(output) if "approvals" in f.key]


@ON_S3_TOO
def test_of_two_who_choose_at_once_both_are_kept(output, tmp_path, monkeypatch):
    """The other's file appears between the listing and the commit of this one."""
    create, others = type(output).create, []

    def overtaken(store, key, data):
        if not others and key == approval(1):
            others.append(key)
            apply(output, tmp_path, REJECTED, who="Bo")
        return create(store, key, data)

    monkeypatch.setattr(type(output), "create", overtaken)
    assert apply(output, tmp_path, APPROVED) == 1
    assert list_approvals(output) == (approval(1), approval(2))
    assert [found[4] for found in chosen(output)] == ["Ada", "Bo"]


def test_damaged_choices_are_found_and_set_aside(output, tmp_path):
    apply(output, tmp_path, APPROVED)
    apply(output, tmp_path, REJECTED)
    output.write(approval(1), output.read(approval(1))[:-40])
    (finding,) = [f for f in verify(output) if f.key == approval(1)]
    assert finding.kind == "damaged choices"
    repair(output, [finding])
    assert [found[:3] for found in chosen(output)] == [REJECTED[:3]]
    assert output.has(f"damaged/{approval(1)}")
    assert apply(output, tmp_path, APPROVED) == 1
    assert list_approvals(output) == (approval(2), approval(3))


def test_a_killed_command_leaves_results_that_the_next_one_mends(output, tmp_path, monkeypatch):
    def killed(output):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tasks.approvals.publish_results", killed)
        with pytest.raises(KeyboardInterrupt):
            apply(output, tmp_path, APPROVED)
    assert set(pq.read_table(io.BytesIO(output.read(RESULTS)))["choice"].to_pylist()) == {None}
    assert apply(output, tmp_path, APPROVED) == 0
    assert "approved" in pq.read_table(io.BytesIO(output.read(RESULTS)))["choice"].to_pylist()


def test_many_who_choose_at_once_lose_nothing(tmp_path):
    store = Store(str(tmp_path / "out"))  # threads of one process share a memory store and an S3 client
    commit_part(store, "000001-0", [row(f"{n}.png", "v", generation=1, output_sha256=sha256(str(n))) for n in range(3)])

    def choose(number):
        one = {"image": f"{number}.png", "variant": "v", "sha256": sha256(str(number)), "choice": "approved"}
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({"schema": 1, "who": f"p{number}", "saved": NOON, "choices": [one]}))
        apply_choices(store, read_choices(str(path)))

    threads = [threading.Thread(target=choose, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list_approvals(store)) == 3
    table = pq.read_table(io.BytesIO(store.read(RESULTS)))
    assert table["choice"].to_pylist() == ["approved"] * 3


CHOICE = {"image": "a.png", "variant": "v", "sha256": "0" * 64, "choice": "approved"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema: Input should be 1"),
        ({"who": "  "}, "who: String should have at least 1"),
        ({"saved": "2026-11-25T12:00:00"}, "saved: .*timezone"),
        ({"saved": "yesterday"}, "saved"),
        ({"extra": 1}, "extra: Extra inputs"),
        ({"choices": [CHOICE | {"sha256": "short"}]}, "choices.0.sha256"),
        ({"choices": [CHOICE | {"choice": "maybe"}]}, "choices.0.choice"),
        ({"choices": [CHOICE, CHOICE]}, "choice 2 repeats choice 1"),
        (None, "Invalid JSON"),
    ],
)
def test_a_file_that_is_no_file_of_choices(tmp_path, change, message):
    path = tmp_path / "choices.json"
    path.write_text("{" if change is None else json.dumps(record() | change))
    with pytest.raises(ChoicesError, match=message):
        read_choices(str(path))


def test_a_file_of_choices_that_is_not_there(tmp_path):
    with pytest.raises(ChoicesError, match="there is no file of choices"):
        read_choices(str(tmp_path / "none.json"))


def test_a_file_of_choices_may_lie_on_any_store(output, tmp_path):
    output.write("choices.json", json.dumps(record(APPROVED)).encode())
    assert apply_choices(output, read_choices(output.uri("choices.json"))) == 1


def test_a_query_reads_choices_and_no_other_file_beside_them(output, tmp_path):
    apply(output, tmp_path, APPROVED)
    output.write("secret.csv", b"a\n1\n")
    assert query(output, "select who from (select choice_by as who from approvals)").fetchall() == [("Ada",)]
    quoted = output.uri("secret.csv").replace("'", "''")
    with pytest.raises(ManifestError, match="disabled"):
        query(output, f"select * from read_csv('{quoted}')").fetchall()
