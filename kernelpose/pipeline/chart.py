"""Bar charts of times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelpose.data.files import replacing
from kernelpose.errors import UserError

_OURS, _OTHERS, _INK, _QUIET = "#ff961c", "#b9c2cf", "#1b222d", "#66707f"
_PARTS = ("#8fa3bf", "#ff961c", "#d5dae1", "#6fb98f", "#c2577e")


@dataclass(frozen=True)
class Comparison:
    """Milliseconds of several ways to do one thing; the first is the baseline, the last ours."""

    title: str
    milliseconds: dict[str, float]


def draw_chart(path: Path, comparisons: list[Comparison], caption: str) -> None:
    """Write a PNG with one group of horizontal bars a comparison, each on its own scale."""
    bars = [len(comparison.milliseconds) for comparison in comparisons]
    figure = _figure(1.2 + 0.62 * len(bars) + 0.42 * sum(bars), "Time for one picture")
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
        _bare(axes, list(labels), max(times))
    _write(figure, path, caption)


def draw_stacks(
    path: Path,
    title: str,
    groups: dict[str, dict[str, dict[str, float]]],
    caption: str,
    *,
    without: str,
) -> None:
    """Write a PNG with stacked bars: a group a row, whole on the left, less one part on the right.

    groups: group -> bar -> part -> seconds; the parts are the same everywhere, `without` is one.
    """
    bars = [len(group) for group in groups.values()]
    figure = _figure(1.7 + 0.62 * len(bars) + 0.42 * sum(bars), title, width=12)
    panels = figure.subplots(len(bars), 2, squeeze=False, height_ratios=bars)
    for row, (heading, group) in zip(panels, groups.items(), strict=True):
        _stacks(row[0], heading, group, None)
        _stacks(row[1], f"{heading}, all but {without}", group, without)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), fontsize=10, frameon=False)
    _write(figure, path, caption)


def _stacks(
    axes: Any, heading: str, group: dict[str, dict[str, float]], without: str | None
) -> None:
    left = [0.0] * len(group)
    for color, part in zip(_PARTS, next(iter(group.values())), strict=True):
        if part == without:
            continue
        widths = [parts[part] * 1e3 for parts in group.values()]
        axes.barh(range(len(group)), widths, left=left, height=0.68, color=color, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        text = f"  {total:.3g} ms" if total < 1000 else f"  {total:.0f} ms"
        axes.text(total, row, text, va="center", fontsize=10, color=_INK)
    axes.set_title(heading, loc="left", fontsize=10.5, color=_INK)
    _bare(axes, list(group), max(left))


def _figure(height: float, title: str, *, width: float = 9) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f"matplotlib is missing ({error}); expected for the chart: "
            "pip install kernelpose[predict]."
        ) from error
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.04, ha="left", fontsize=15, fontweight="bold", color=_INK)
    return figure


def _bare(axes: Any, labels: list[str], longest: float) -> None:
    """Bars with their names, and nothing else around them."""
    axes.set_yticks(range(len(labels)), labels, fontsize=10, color=_INK)
    axes.set_xticks([])
    axes.set_xlim(0, longest * 1.25)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(_OTHERS)


def _write(figure: Any, path: Path, caption: str) -> None:
    figure.text(0.04, 0.02, caption, fontsize=8.5, color=_QUIET)
    figure.tight_layout(rect=(0.02, 0.045, 0.98, 0.97), h_pad=1.6)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
