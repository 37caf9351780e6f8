"""docs/scale.png from benchmarks/results/scale.json.

python -m benchmarks.plot_scale
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULTS = Path("benchmarks/results/scale.json")


def main() -> None:
    """Three panels: planning, queries, what the pipeline adds to an image."""
    results = {name: entry["figures"] for name, entry in json.loads(RESULTS.read_text()).items()}
    figure, (planning, queries, pipeline) = plt.subplots(1, 3, figsize=(12, 3.4))
    rows = [f["rows"] for f in results["planning"]]
    planning.loglog(rows, [f["plan_and_read_seconds"] for f in results["planning"]], "o-", label="seconds")
    planning.loglog(rows, [f["peak_bytes"] / 1e9 for f in results["planning"]], "s--", label="peak memory, GB")
    planning.set(title="planning", xlabel="images")
    planning.legend()
    names = list(results["queries"]["loose_seconds"])
    for offset, kind in ((-0.2, "loose"), (0.2, "compacted")):
        places = [place + offset for place in range(len(names))]
        queries.barh(places, [results["queries"][f"{kind}_seconds"][name] for name in names], 0.4, label=kind)
    queries.set(title=f"queries over {results['queries']['rows']:,} rows", xlabel="seconds", xscale="log")
    queries.set_yticks(range(len(names)), names)
    queries.set_ylim(top=len(names) + 0.3)
    queries.legend(loc="upper center", ncols=2)
    labels = [f"{f['sleep_seconds']:.0f} s an image,\n{f['actors']} actors" for f in results["pipeline"]]
    pipeline.bar(labels, [f["overhead_ms_per_image"] for f in results["pipeline"]])
    pipeline.set(title="the pipeline's own time", ylabel="ms an image")
    figure.tight_layout()
    figure.savefig("docs/scale.png", dpi=90)


if __name__ == "__main__":
    main()
