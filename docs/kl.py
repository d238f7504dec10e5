"""The picture of docs/rl.md: the KL divergence between rollout and trainer in every step of a GRPO run, stock and tpinv.

python docs/kl.py STOCK.json TPINV.json docs/kl.png         from examples/grpo_smollm2.py --json
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STEPS = 50  # at most


def draw(stock: dict, tpinv: dict, path: str) -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4), sharex=True, height_ratios=(2, 1))
    for run, color in ((stock, "tab:red"), (tpinv, "tab:blue")):
        rows = run["rows"][:STEPS]
        steps = [row["step"] for row in rows]
        top.plot(steps, [row["kl"] for row in rows], color=color, label=run["layers"])
        bottom.plot(steps, [row["ratio_max"] for row in rows], color=color)
        bottom.plot(steps, [row["ratio_min"] for row in rows], color=color)
    top.set(ylabel="KL(rollout, trainer)", title=f"GRPO, trainer TP = 1, rollout vLLM TP = {tpinv['tp']}, bf16, {tpinv['device']}")
    top.legend()
    bottom.set(xlabel="step", ylabel="importance ratio")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(*(json.loads(Path(name).read_text()) for name in sys.argv[1:3]), sys.argv[3])
