"""From benchmarks/results/quality.json the tables of README's "Measured" (printed) and docs/quality.md, ablations too.

python -m benchmarks.readme_tables
"""

import json
from pathlib import Path

from benchmarks.quality import RIVALS
from diffcolor_study import METHODS

HEAD = """# The method, its rivals and its parts

Made by `make study` and `python -m benchmarks.readme_tables`; {hardware}, {date}, scenes drawn from seed {seed}, preset
`{preset}`. Each row changes one thing of `full`; means with bootstrap 95% intervals. With 8 scenes an interval from
1.00 to 1.00 says that none failed, not that none would.
"""
RESULTS = Path("benchmarks/results/quality.json")
COLUMNS = {
    "object_color_accuracy": ("hues right", ".2f"),
    "all_right_per_image": ("all right", ".2f"),
    "edit_success": ("edit succeeds", ".2f"),
    "leakage": ("leakage, ΔE_ab", ".1f"),
}
AUTOMATIC = {
    "colorfulness": ("colourfulness", ".0f"),
    "colorfulness_distance": ("distance to truth's", ".2f"),
    "clip_similarity": ("CLIP (judge)", ".3f"),
    "anti_color_look": ("anti-colour look", ".2f"),
}


def table(results: dict[str, dict[str, dict[str, dict[str, float]]]], tasks: list[str], columns: dict) -> str:
    """Mean and 95% interval of each method."""
    lines = ["| task | method | scenes | " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for task in tasks:
        for method, row in results[task].items():
            cells = []
            for figure, (_, form) in columns.items():
                value = row.get(figure)
                interval = value and f" ({value['low']:{form}} to {value['high']:{form}})"
                cells.append(f"{value['mean']:{form}}{interval}" if value else "")
            lines.append(f"| {task} | {method} | {row['leakage' if 'leakage' in row else 'colorfulness']['scenes']} | ")
            lines[-1] += " | ".join(cells) + " |"
    return "\n".join(lines)


def main() -> None:
    """Print the rivals, write all."""
    results = json.loads(RESULTS.read_text())
    rivals = {task: {name: results[task][name] for name in names} for task, names in RIVALS.items()}
    print(table(rivals, ["full-prompt", "edit"], COLUMNS), "\n")
    print(table(rivals, ["automatic"], AUTOMATIC))
    tables = [table(results, ["full-prompt", "edit"], COLUMNS), table(results, ["automatic"], AUTOMATIC)]
    used = {name for task in RIVALS for name in results[task]}
    meanings = [f"- `{name}`: {method.description}" for name, method in METHODS.items() if name in used]
    parts = [HEAD.format(**results["about"]), "\n".join(meanings), *tables]
    Path("docs/quality.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


if __name__ == "__main__":
    main()
