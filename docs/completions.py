"""Draws docs/completions.png from what ``python -m tests.gpu_vllm_job`` wrote: how often each completion of one prompt came.

    python docs/completions.py results.json [--model padded] [--out docs/completions.png]

A bar is an engine's 1000 completions, cut where another completion begins, the most frequent first.
"""

import argparse
import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"widths": "random Llama, 8B widths", "padded": "SmolLM2-135M", "smollm2": "SmolLM2-135M"}
KINDS = {"stock": "stock vLLM", "batch-invariant": "VLLM_BATCH_INVARIANT", "tpinv": "tpinv"}
COLORS = {"stock": "#b0b0b0", "batch-invariant": "#7da7d9", "tpinv": "#2a7f4f"}


def label(engine: str) -> str:
    model, kind, size, _ = engine.split(maxsplit=3)
    return f"{NAMES[model]}: {KINDS[kind]}, {size.replace('=', ' ')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results")
    parser.add_argument("--model", nargs="+", default=["widths", "padded"])
    parser.add_argument("--out", default="docs/completions.png")
    arguments = parser.parse_args()
    with open(arguments.results, encoding="utf-8") as file:
        results = json.load(file)
    bars = [
        (name, found["completions"]) for name, found in results.items() if "completions" in found and name.split()[0] in arguments.model
    ]
    bars.sort(key=lambda bar: (arguments.model.index(bar[0].split()[0]), [*COLORS].index(bar[0].split()[1]), bar[0]))
    figure, axes = plt.subplots(figsize=(10, 0.6 + 0.42 * len(bars)), layout="constrained")
    for row, (name, found) in enumerate(reversed(bars)):
        left = 0
        for kind in found["completions"]:
            axes.barh(row, kind["count"], left=left, height=0.7, color=COLORS[name.split()[1]], edgecolor="white", linewidth=0.6)
            left += kind["count"]
        text = f"{found['unique']} unique; with log-probabilities {found['unique_bytes']}"
        axes.text(left * 1.01, row, text, va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [label(name) for name, _ in reversed(bars)], fontsize=9)
    axes.set_xlim(0, 1000 * 1.55)
    axes.set_xticks([0, 250, 500, 750, 1000])
    axes.set_title("1000 completions of one prompt at temperature 0, among strangers in batches of 1 to 64", loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(arguments.out, dpi=160)


if __name__ == "__main__":
    main()
