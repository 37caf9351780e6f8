"""The tables of README's "Measured", from benchmarks/results/quality.json.

python -m benchmarks.readme_tables
"""

import json
from pathlib import Path

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
    """Print both tables."""
    results = json.loads(RESULTS.read_text())
    print(table(results, ["full-prompt", "edit"], COLUMNS), "\n")
    print(table(results, ["automatic"], AUTOMATIC))


if __name__ == "__main__":
    main()
