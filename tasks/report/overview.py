"""What the report's first page says of a whole output: counts, hours, errors, histograms, words not obeyed."""

import math
from collections.abc import Sequence
from typing import Any

import duckdb

OBEYED = 0.5
"""Agreement from which a colour word counts as obeyed: its hue within 60°, at full chroma."""
NUM_BINS = 32
NUM_EXAMPLES = 8

_RUNS = """
    select run_id as run, count(distinct image_key) as images, count(*) filter (status = 'ok') as ok,
        count(*) filter (status = 'quarantined') as quarantined, count(*) filter (status = 'failed') as failed,
        strftime(min(started_at), '%Y-%m-%d %H:%M') as started,
        strftime(max(finished_at), '%Y-%m-%d %H:%M') as finished,
        count(distinct image_key) * 3600 / greatest(1, epoch(max(finished_at) - min(started_at))) as images_per_hour
    from attempts where adopted_from is null group by run_id order by min(started_at) desc limit 50"""

# A fit serves several variants, and each of their rows has its seconds: they count once.
_STAGES = """
    with worked as (from attempts where status = 'ok' and adopted_from is null),
    fits as (
        select any_value(stage1_seconds) as stage1, any_value(stage2_seconds) as stage2 from worked
        where not coalesce(fit_reused, false) group by run_id, image_key, input_sha256, context_prompt
    )
    select 'Stage 1: the prior' as stage, count(stage1), median(stage1), sum(stage1) from fits
    union all select 'Stage 2: the fit', count(stage2), median(stage2), sum(stage2) from fits
    union all select 'Sampling', count(sampling_seconds), median(sampling_seconds), sum(sampling_seconds) from worked
    union all select 'Assembly, metrics, writing', count(rest), median(rest), sum(rest) from (
        select total_seconds - sampling_seconds
            - if(coalesce(fit_reused, false), 0, stage1_seconds + stage2_seconds) as rest from worked)"""

_ERRORS = """
    select status, error_class as error, count(*) as results, any_value(error_message) as message,
        list_slice(list(distinct image_key), 1, 3) as examples
    from results where status <> 'ok' group by all order by results desc, error limit 20"""

_NOUNS = f"""
    select word.color as color, word.noun as noun, count(*) as asked,
        count(*) filter (word.agreement >= {OBEYED}) as obeyed, count(*) filter (not word.feasible) as infeasible
    from (select unnest(nouns) as word from results where status = 'ok')
    group by all having obeyed < asked order by asked - obeyed desc, noun, color limit 30"""

_EXAMPLES = f"""
    select image_key, variant, input_sha256, output_sha256, target_prompt from results
    where status = 'ok' and input_sha256 is not null and output_sha256 is not null
    qualify row_number() over (partition by image_key order by target_prompt is null, variant) = 1
    order by hash(image_key) limit {NUM_EXAMPLES}"""


def is_obeyed(nouns: Sequence[dict[str, Any]] | None) -> bool | None:
    """Whether a result obeys all its colour words; None if there are none."""
    return all((noun["agreement"] or 0) >= OBEYED for noun in nouns) if nouns else None


def overview(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """The figures of the first page, from the views `results` and `attempts`."""
    counts = {status: {"results": results, "images": images} for status, results, images in _all(connection, _COUNTS)}
    stages = [dict(zip(("stage", "times", "median", "total"), row, strict=True)) for row in _all(connection, _STAGES)]
    (num_results, num_images), *_ = _all(connection, "select count(*), count(distinct image_key) from results")
    return {
        "counts": counts,
        "num_results": num_results,
        "num_images": num_images,
        "runs": _records(connection, _RUNS),
        "stages": stages,
        "hours": sum(stage["total"] or 0 for stage in stages) / 3600,
        "errors": _records(connection, _ERRORS),
        "nouns": _records(connection, _NOUNS),
        "examples": _records(connection, _EXAMPLES),
        "histograms": [
            _histogram(connection, "colorfulness", "Colourfulness", "Hasler and Süsstrunk 2003", ""),
            _histogram(connection, "p99_abs_delta_l", "Luminance error", "99th percentile of |ΔL*|", "L*"),
        ],
    }


_COUNTS = "select status, count(*), count(distinct image_key) from results group by status order by count(*) desc"


def _histogram(
    connection: duckdb.DuckDBPyConnection, column: str, title: str, note: str, unit: str
) -> dict[str, Any] | None:
    """Counts of a column in `NUM_BINS` equal bins from 0 to its largest value; None if it has no value."""
    finite = f"status = 'ok' and isfinite({column})"
    ((largest, median, count),) = _all(
        connection, f"select max({column}), median({column}), count(*) from results where {finite}"
    )
    if not count:
        return None
    top = largest if largest > 0 else 1.0
    found = dict(
        _all(
            connection,
            f"select least({NUM_BINS - 1}, floor({column} / {top!r} * {NUM_BINS})::int) as bin, count(*) "
            f"from results where {finite} group by bin",
        )
    )
    bins = [found.get(number, 0) for number in range(NUM_BINS)]
    digits = max(0, 2 - math.floor(math.log10(top)))
    return {
        "title": title,
        "note": note,
        "unit": unit,
        "column": column,
        "bins": bins,
        "highest": max(bins),
        "width": top / NUM_BINS,
        "top": top,
        "median": median,
        "digits": digits,
        "count": count,
    }


def _all(connection: duckdb.DuckDBPyConnection, sql: str) -> list[tuple[Any, ...]]:
    return connection.execute(sql).fetchall()


def _records(connection: duckdb.DuckDBPyConnection, sql: str) -> list[dict[str, Any]]:
    rows = connection.execute(sql)
    names = [column[0] for column in rows.description]
    return [dict(zip(names, row, strict=True)) for row in rows.fetchall()]
