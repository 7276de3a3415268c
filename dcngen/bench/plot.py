"""The figure of the operator benchmark: time over the memory floor, ours beside the released operator."""

from __future__ import annotations

from pathlib import Path

OURS, RELEASED, FLOOR = "#1b6ca8", "#c8c8c8", "#222222"


def draw_operator(rows, device_name: str, path: Path) -> None:
    """Draws forward and backward of every case as bars on a log scale with the memory floor marked.

    Args:
        rows: finished ``dcngen.bench.operator.Case`` objects.
        device_name: for the title.
        path: where to write; the suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 0.34 * len(rows) + 1.6), sharey=True, layout="constrained")
    positions = range(len(rows))
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        ours = [getattr(r, f"{direction}_us") for r in rows]
        released = [r.others.get(f"released_{direction}") or float("nan") for r in rows]
        floors = [getattr(r, f"{direction}_floor_us") for r in rows]
        axis.barh(positions, released, color=RELEASED, label="released DCNv4", height=0.8)
        axis.barh(positions, ours, color=OURS, label="dcngen", height=0.5)
        axis.plot(floors, positions, "|", color=FLOOR, markersize=11, markeredgewidth=2, label="memory floor")
        for y, (row, a, b) in enumerate(zip(rows, ours, released, strict=True)):
            if b == b:
                wrong = " (its output is wrong)" if direction == "forward" and "released_error" in row.others else ""
                axis.text(b * 1.05, y, f"{b / a:.1f}x{wrong}", va="center", fontsize=8)
        axis.set_xscale("log")
        axis.margins(x=0.25, y=0.01)
        axis.set_xlabel("microseconds")
        axis.set_title(direction)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(positions, [f"{r.shape}  D={r.group_channels}  {r.dtype}" for r in rows], fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(f"DCNv4 operator, 3x3, {device_name}", x=0.02, ha="left")
    figure.legend(*axes[1].get_legend_handles_labels(), frameon=False, loc="outside upper right", ncols=3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
