"""docs/results.md and its plots from benchmarks/results/*.json: `make docs` (seconds).

python -m benchmarks.report            write the page and draw the plots
python -m benchmarks.report --check    exit 1 if the committed page is not what the results give

The prose is in benchmarks/results.md.jinja, which takes every measured figure from the results.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffcolor_study.methods import METHODS
from diffcolor_study.photographs import FLAT

TEMPLATE = Path(__file__).with_name("results.md.jinja")
CAPTIONS = {
    "object_color_accuracy": ("hues right", ".2f"),
    "all_right_per_image": ("all right", ".2f"),
    "edit_success": ("edit succeeds", ".2f"),
    "leakage": ("leakage, ΔE_ab", ".1f"),
    "leakage_anew": ("leakage, made anew", ".1f"),
    "colorfulness": ("colourfulness", ".0f"),
    "colorfulness_distance": ("distance to truth's colourfulness", ".2f"),
    "clip_similarity": ("CLIP (judge)", ".3f"),
    "anti_color_look": ("anti-colour look", ".2f"),
    "delta_e": ("ΔE_ab", ".1f"),
    "delta_e_ratio": ("ΔE, share of gray's", ".2f"),
    "better_than_gray": ("better than gray", ".2f"),
    "colorfulness_share": ("colourfulness, share of truth's", ".2f"),
    "region_turned": ("turned", ".2f"),
    "delta_e_elsewhere": ("elsewhere", ".1f"),
    "hue_within_10_degrees": ("hue within 10°", ".2f"),
    "chroma_share": ("chroma, share of the code's", ".2f"),
    "psnr": ("PSNR, dB", ".1f"),
    "ssim": ("SSIM", ".3f"),
    "ssim_l": ("SSIM of L\\*", ".3f"),
}
"""How a figure is called in a table, and printed."""

Method = dict[str, dict[str, Any]]


def interval(value: dict[str, Any], form: str = ".2f") -> str:
    """A mean with its 95% interval."""
    return f"{value['mean']:{form}} ({value['low']:{form}} to {value['high']:{form}})"


def table(methods: dict[str, Method], figures: list[str] | None = None) -> str:
    """Methods as rows, figures (those of CAPTIONS that occur) as columns, means with 95% intervals as cells."""
    shown = [f for f in figures or CAPTIONS if any(f in row for row in methods.values())]
    titles = ["method", "what it is", "scenes", *(CAPTIONS[f][0] for f in shown)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, row in methods.items():
        described = METHODS[name].description if name in METHODS else FLAT.get(name, "removed")
        scenes = max(row[f]["scenes"] for f in shown if f in row)
        cells = [interval(row[f], CAPTIONS[f][1]) if f in row else "" for f in shown]
        lines.append(" | ".join([f"| `{name}`", described, str(scenes), *cells]) + " |")
    return "\n".join(lines)


def page(results: Path) -> str:
    """The page as Markdown."""
    known = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    studies = {name: known.pop(name) for name in sorted(known) if name.startswith("study-")}
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is Markdown
    )
    environment.filters["interval"] = interval
    environment.filters["f"] = lambda value, form: format(value, form)
    return environment.get_template(TEMPLATE.name).render(**known, studies=studies, table=table)


def draw(results: Path, docs: Path) -> None:
    """Draw the plots of the ablations and of the scale."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    same_bytes = {"dpi": 90, "metadata": {"Software": None}}
    quality = json.loads((results / "quality.json").read_text())
    panels = [("full-prompt", "object_color_accuracy"), ("full-prompt", "leakage_anew")]
    panels += [("edit", "edit_success"), ("automatic", "colorfulness_distance")]
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 5.2))
    for axis, (task, name) in zip(axes, panels, strict=True):
        methods = {m: row[name] for m, row in quality[task].items() if name in row}
        places = range(len(methods), 0, -1)
        for place, value in zip(places, methods.values(), strict=True):
            axis.plot([value["low"], value["high"]], [place, place], color="tab:blue")
            axis.plot(value["mean"], place, "o", color="tab:blue")
        axis.axvline(methods["full"]["mean"], color="gray", linestyle="--", linewidth=0.8)
        axis.set_yticks(list(places), list(methods), fontsize=8)
        axis.set_title(f"{task}: {CAPTIONS[name][0]}", fontsize=9)
    figure.tight_layout()
    figure.savefig(docs / "ablations.png", **same_bytes)

    scale = {name: entry["figures"] for name, entry in json.loads((results / "scale.json").read_text()).items()}
    figure, (planning, queries, pipeline) = plt.subplots(1, 3, figsize=(12, 3.4))
    rows = [f["rows"] for f in scale["planning"]]
    planning.loglog(rows, [f["plan_and_read_seconds"] for f in scale["planning"]], "o-", label="seconds")
    planning.loglog(rows, [f["peak_bytes"] / 1e9 for f in scale["planning"]], "s--", label="peak memory, GB")
    planning.set(title="planning", xlabel="images")
    planning.legend()
    names = list(scale["queries"]["loose_seconds"])
    for offset, kind in ((-0.2, "loose"), (0.2, "compacted")):
        places_of_kind = [place + offset for place in range(len(names))]
        queries.barh(places_of_kind, [scale["queries"][f"{kind}_seconds"][n] for n in names], 0.4, label=kind)
    queries.set(title=f"queries over {scale['queries']['rows']:,} rows", xlabel="seconds", xscale="log")
    queries.set_yticks(range(len(names)), names)
    queries.set_ylim(top=len(names) + 0.3)
    queries.legend(loc="upper center", ncols=2)
    labels = [f"{f['sleep_seconds']:.0f} s an image,\n{f['actors']} actors" for f in scale["pipeline"]]
    pipeline.bar(labels, [f["overhead_ms_per_image"] for f in scale["pipeline"]])
    pipeline.set(title="the pipeline's own time", ylabel="ms an image")
    figure.tight_layout()
    figure.savefig(docs / "scale.png", **same_bytes)


def main(
    check: Annotated[bool, typer.Option(help="Write nothing; exit 1 if the page is out of date.")] = False,
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/results"),
    docs: Annotated[Path, typer.Option(help="Folder of the page and the plots.")] = Path("docs"),
) -> None:
    """Write the page and draw the plots."""
    made = page(results)
    path = docs / "results.md"
    if not check:
        path.write_text(made)
        draw(results, docs)
    elif not path.exists() or path.read_text() != made:
        typer.echo(f"{path} is not what {results} gives: run `make docs`", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
