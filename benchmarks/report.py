"""The table, the JSON and the chart of one benchmark run."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, roof
from benchmarks.rows import Row


class Report:
    """Rows of one run on one device, with the roof that was measured in it."""

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.rows: list[Row] = []
        self.notes: dict[str, Any] = {}
        self._machine = describe(device)
        self._folder = folder
        dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
        self._roof = {str(d).removeprefix("torch."): roof(device, d) for d in dtypes}

    def table(self) -> Iterator[str]:
        """Medians in ms, the ratio to the best that is not ours, and shares of the roof."""
        yield ""
        machine = self._machine
        threads = f"{machine['threads']} threads" if machine["threads"] else "GPU"
        yield f"{machine['device']}, {threads}, commit {machine['commit']}"
        for dtype, limits in self._roof.items():
            gb, gflop = limits["bytes_per_second"] / 1e9, limits["flops_per_second"] / 1e9
            yield f"roof measured in this run, {dtype}: {gb:.1f} GB/s, {gflop:.0f} GFLOP/s"
        header = f"{'case':44} {'':8} {'ours':>31} {'best other':>40} {'ratio':>6}  of the roof"
        yield header
        for row in self.rows:
            ours, other = row.times[row.chosen].median, row.times[row.best_other].median
            yield (
                f"{row.case:44} {row.direction:8} "
                f"{row.chosen:>19} {ours * 1e3:8.3f} ms {row.best_other:>27} {other * 1e3:8.3f} ms "
                f"{row.ratio:5.2f}x  {self._of_the_roof(row)}"
            )

        for title, note in self.notes.items():
            yield f"{title}: {note}"

    def _of_the_roof(self, row: Row) -> str:
        limits, parts = self._roof.get(row.dtype), []
        seconds = row.times[row.chosen].median
        for amount, unit, name in ((row.bytes, "GB/s", "bytes"), (row.flops, "GFLOP/s", "flops")):
            if amount:
                part = f"{amount / seconds / 1e9:.1f} {unit}"
                if limits:
                    part += f" ({amount / seconds / limits[name + '_per_second']:.0%})"
                parts.append(part)
        if row.inputs_in_l2:
            parts.append("inputs in L2")
        return ", ".join(parts)

    def save(self) -> list[Path]:
        """Write <folder>/<device>/<date>-<commit>.json and .png; returns the paths."""
        slug = re.sub(r"[^a-z0-9]+", "-", self._machine["device"].lower()).strip("-")
        if self._machine["threads"]:
            slug += f"-{self._machine['threads']}-threads"
        folder = self._folder / slug
        folder.mkdir(parents=True, exist_ok=True)
        today = datetime.date.today().isoformat()
        path = folder / f"{today}-{self._machine['commit'] or 'unknown'}.json"
        content = {
            "date": today,
            "machine": self._machine,
            "roof": self._roof,
            "notes": self.notes,
            "rows": [row.as_json() for row in self.rows],
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)
        return [path, self._chart(path.with_suffix(".png"))]

    def _chart(self, path: Path) -> Path:
        """Horizontal bars: the chosen contender's speed against the best other's, one a row."""
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        rows = self.rows[::-1]
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.28 * len(rows)), layout="constrained")
        colours = ["#2a9d5c" if row.ratio >= 1 else "#c8553d" for row in rows]
        bars = axes.barh(range(len(rows)), [row.ratio for row in rows], color=colours)
        labels = [
            f"{row.ratio:.2f}x  ({'beats' if row.ratio >= 1 else 'behind'} {row.best_other})"
            for row in rows
        ]
        axes.bar_label(bars, labels, padding=3, fontsize=7)
        axes.set_yticks(range(len(rows)), [f"{r.case} {r.direction}" for r in rows], fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlim(0, max(row.ratio for row in rows) * 1.3)
        axes.set_xlabel("times faster than the best alternative in the same run (medians)")
        axes.set_title(f"{self._machine['device']}, commit {self._machine['commit']}", fontsize=9)
        partial = path.with_suffix(".partial.png")
        figure.savefig(partial, dpi=130)
        pyplot.close(figure)
        partial.replace(path)
        return path
