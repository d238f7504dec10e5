"""The pictures: of a verify run, tensors x layouts, stock beside tpinv; of two recorded runs, modules x tensors; of bench gemm, ratios."""

import math
import statistics

RED = "#d62728"  # beyond every number: NaN or infinite on one side
LABEL = "log2(1 + largest difference in ulps of the tensor's largest value), red: NaN or inf"


def heat_map(rows, path: str, title: str) -> None:
    """Writes a PNG (or whatever the suffix of ``path`` names). Colour is log2(1 + the largest difference of a tensor in ulps of its largest
    value); white is equal bytes, grey was not compared."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {layers: [row for row in rows if row.layers == layers and row.tp > 1] for layers in ("stock", "tpinv")}
    names = list(dict.fromkeys(name for row in rows for name in row.ulps))
    top = _top(ulp for row in rows for ulp in row.ulps.values())
    width = max(len(panel) for panel in panels.values())
    figure, axes = pyplot.subplots(
        1, 2, sharey=True, figsize=(6.5 + 0.9 * width, 1.6 + 0.145 * len(names)), layout="constrained", squeeze=False
    )
    colors = matplotlib.colormaps["viridis_r"].with_extremes(bad="lightgrey", under="white", over=RED)
    for axis, (layers, panel) in zip(axes[0], panels.items(), strict=True):
        image = axis.imshow(
            [[_color(row.ulps.get(name, math.nan)) for row in panel] for name in names],
            aspect="auto", interpolation="nearest", vmin=0.0, vmax=top, cmap=colors,
        )  # fmt: skip
        differing, total = sum(row.differing for row in panel), sum(row.tensors for row in panel)
        axis.set_title(f"{layers}: {differing} of {total} differ", fontsize=10)
        axis.set_xticks(range(len(panel)), [f"TP={row.tp}{' SP' if row.sp else ''}" for row in panel], fontsize=8, rotation=45, ha="right")
        axis.set_yticks(range(len(names)), names, fontsize=6)
    figure.colorbar(image, ax=axes[0].tolist(), label=LABEL, shrink=0.5)
    figure.suptitle(f"distance from TP=1, white: the same bytes\n{title}", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _color(ulp: float | None) -> float:
    """Below 0, white, for None (the same bytes); NaN, grey, for NaN (not compared); the logarithm otherwise."""
    return -1.0 if ulp is None else math.log2(1 + ulp)


def _top(ulps) -> float:
    return max((math.log2(1 + ulp) for ulp in ulps if ulp is not None and math.isfinite(ulp)), default=0.0) or 1.0


def module_map(rows, path: str, title: str) -> None:
    """The picture of a comparison of two runs: modules in their order x tensors, the largest distance over steps and calls."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    distances: dict[tuple[str, str], float | None] = {}
    compared = [row for row in rows if row.compared]
    for row in compared:
        at = (row.key.module or "(model)", _column(row.key))
        ulp = (math.inf if row.difference.nonfinite else row.difference.max_ulp) if row.difference else 1.0  # digests do not tell
        distances[at] = max(distances.get(at), ulp if row.differs else None, key=_color)
    # Parameters are recorded first, in the order of construction; modules shall stand in the order in which they are called.
    modules = list(dict.fromkeys(row.key.module or "(model)" for row in sorted(compared, key=lambda row: row.key.phase != "forward")))
    tensors = sorted({tensor for _, tensor in distances}, key=_place)
    top = _top(distances.values())
    figure, axis = pyplot.subplots(figsize=(4.5 + 0.45 * len(tensors), 1.8 + 0.145 * len(modules)), layout="constrained")
    colors = matplotlib.colormaps["viridis_r"].with_extremes(bad="lightgrey", under="white", over=RED)
    image = axis.imshow(
        [[_color(distances.get((module, tensor), math.nan)) for tensor in tensors] for module in modules],
        aspect="auto", interpolation="nearest", vmin=0.0, vmax=top, cmap=colors,
    )  # fmt: skip
    axis.set_xticks(range(len(tensors)), tensors, fontsize=7, rotation=60, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(modules)), modules, fontsize=6)
    figure.colorbar(image, ax=axis, label=LABEL, shrink=0.5)
    figure.suptitle(f"{title}\nwhite: the same bytes, grey: no such tensor", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


_KINDS = ("parameter", "input", "output", "recompute", "grad_output", "grad_input", "gradient")


def _column(key) -> str:
    """input.0 and input.attention_mask are both "input"; parameters keep their names."""
    if key.phase == "recompute":
        return key.phase
    return key.tensor if key.phase in ("parameter", "gradient") else key.tensor.partition(".")[0]


def _place(column: str) -> tuple[int, str]:
    kind = column if column in _KINDS else "gradient" if column.endswith(".grad") else "parameter"
    return _KINDS.index(kind), column


def ratio_lines(rows: list[dict], path: str, title: str) -> None:
    """The picture of ``tpinv bench gemm``: cuBLAS time / time over tokens, a panel for each linear and product."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    products = list(dict.fromkeys(row["product"] for row in rows))
    linears = list(dict.fromkeys((row["model"], row["linear"], row["N"], row["K"]) for row in rows))
    size = (1.2 + 2.6 * len(linears), 1.2 + 2.3 * len(products))
    figure, axes = pyplot.subplots(len(products), len(linears), sharex=True, sharey=True, figsize=size, layout="constrained", squeeze=False)
    names = list(dict.fromkeys((row["implementation"], row["leaves"]) for row in rows))
    for i, product in enumerate(products):
        for j, linear in enumerate(linears):
            axis = axes[i][j]
            axis.axhline(1.0, color="black", linewidth=0.6)
            here = [row for row in rows if (row["product"], row["model"], row["linear"], row["N"], row["K"]) == (product, *linear)]
            for color, (name, leaves) in enumerate(names):
                line = sorted((row["M"], row["ratio"]) for row in here if (row["implementation"], row["leaves"]) == (name, leaves))
                style = "-" if name == "tpinv" else "--"
                label = f"L={leaves}" if name == "tpinv" else name
                axis.plot(*zip(*line, strict=True) if line else ([], []), style, marker=".", color=f"C{color}", label=label)
            axis.set_xscale("log", base=2)
            axis.set_title(f"{product} {linear[1]}, N={linear[2]} K={linear[3]}\n{linear[0]}", fontsize=7)
            axis.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=6)
    figure.supxlabel("tokens", fontsize=9)
    figure.supylabel("cuBLAS time / time", fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def step_bars(rows: list[dict], parts: tuple[str, ...], path: str, title: str) -> None:
    """The picture of ``tpinv bench step``: milliseconds of a step's parts, stock beside tpinv, a panel for each layout; medians over rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layouts = list(dict.fromkeys((row["tp"], row["sp"], row["leaves"]) for row in rows))
    size = (1.5 + 3.4 * len(layouts), 3.6)
    figure, axes = pyplot.subplots(1, len(layouts), figsize=size, layout="constrained", squeeze=False)
    for axis, (tp, sp, leaves) in zip(axes[0], layouts, strict=True):
        here = [row for row in rows if (row["tp"], row["sp"], row["leaves"]) == (tp, sp, leaves)]
        for offset, layers in ((-0.2, "stock"), (0.2, "tpinv")):
            times = [statistics.median(row[part] for row in here if row["layers"] == layers) for part in parts]
            bars = axis.bar([i + offset for i in range(len(parts))], times, width=0.4, label=layers)
            axis.bar_label(bars, fmt="%.1f", fontsize=6)
        axis.set_xticks(range(len(parts)), parts, fontsize=8)
        axis.set_title(f"TP={tp}{' SP' if sp else ''}, L={leaves}", fontsize=9)
    axes[0][0].set_ylabel("milliseconds")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
