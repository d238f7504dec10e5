"""The picture of a verify run: tensors x layouts, the distance from TP = 1 in ulps, stock beside tpinv."""

import math


def heat_map(rows, path: str, title: str) -> None:
    """Writes a PNG (or whatever the suffix of ``path`` names). Colour is log2(1 + largest ulp distance of a tensor); white is equal bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {layers: [row for row in rows if row.layers == layers and row.tp > 1] for layers in ("stock", "tpinv")}
    names = list(next(iter(panels.values()))[0].ulps)
    top = max((math.log2(1 + ulp) for row in rows for ulp in row.ulps.values()), default=1.0) or 1.0
    width = max(len(panel) for panel in panels.values())
    figure, axes = pyplot.subplots(
        1, 2, sharey=True, figsize=(6.5 + 0.9 * width, 1.6 + 0.145 * len(names)), layout="constrained", squeeze=False
    )
    for axis, (layers, panel) in zip(axes[0], panels.items(), strict=True):
        image = axis.imshow(
            [[math.log2(1 + row.ulps[name]) or math.nan for row in panel] for name in names],
            aspect="auto", interpolation="nearest", vmin=0.0, vmax=top, cmap="viridis_r",
        )  # fmt: skip
        differing, total = sum(row.differing for row in panel), sum(row.tensors for row in panel)
        axis.set_title(f"{layers}: {differing} of {total} differ", fontsize=10)
        axis.set_xticks(range(len(panel)), [f"TP={row.tp}{' SP' if row.sp else ''}" for row in panel], fontsize=8, rotation=45, ha="right")
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.set_facecolor("white")
    figure.colorbar(image, ax=axes[0].tolist(), label="log2(1 + largest distance in ulp)", shrink=0.5)
    figure.suptitle(f"distance from TP=1, white: the same bytes\n{title}", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
