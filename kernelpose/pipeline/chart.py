"""The demonstration's bar chart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kernelpose.data.files import replacing
from kernelpose.errors import UserError

_OURS, _OTHERS, _INK, _QUIET = "#ff961c", "#b9c2cf", "#1b222d", "#66707f"


@dataclass(frozen=True)
class Comparison:
    """Milliseconds of several ways to do one thing; the first is the baseline, the last ours."""

    title: str
    milliseconds: dict[str, float]


def draw_chart(path: Path, comparisons: list[Comparison], caption: str) -> None:
    """Write a PNG with one group of horizontal bars a comparison, each on its own scale."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f"matplotlib is missing ({error}); expected for the chart: "
            "pip install kernelpose[predict]."
        ) from error
    bars = [len(comparison.milliseconds) for comparison in comparisons]
    figure = Figure(figsize=(9, 1.2 + 0.62 * len(bars) + 0.42 * sum(bars)), dpi=150)
    FigureCanvasAgg(figure)
    figure.suptitle(
        "Time for one picture", x=0.04, ha="left", fontsize=15, fontweight="bold", color=_INK
    )
    panels = figure.subplots(len(bars), 1, squeeze=False, height_ratios=bars)[:, 0]
    for axes, comparison in zip(panels, comparisons, strict=True):
        labels, times = zip(*comparison.milliseconds.items(), strict=True)
        colors = [_OTHERS] * (len(times) - 1) + [_OURS]
        axes.barh(range(len(times)), times, height=0.68, color=colors)
        for row, value in enumerate(times):
            speed = f"   {times[0] / value:.2f}x" if row else ""
            text = f"  {value:.3g} ms" if value < 1000 else f"  {value:.0f} ms"
            axes.text(value, row, text + speed, va="center", fontsize=10, color=_INK,
                      fontweight="bold" if row == len(times) - 1 else "normal")  # fmt: skip
        axes.set_title(comparison.title, loc="left", fontsize=10.5, color=_INK)
        axes.set_yticks(range(len(times)), labels, fontsize=10, color=_INK)
        axes.set_xticks([])
        axes.set_xlim(0, max(times) * 1.25)
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.spines["left"].set_color(_OTHERS)
    figure.text(0.04, 0.02, caption, fontsize=8.5, color=_QUIET)
    figure.tight_layout(rect=(0.02, 0.045, 0.98, 0.97), h_pad=1.6)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
