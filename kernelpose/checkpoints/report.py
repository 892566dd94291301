"""What became of a checkpoint's tensors."""

from __future__ import annotations

from dataclasses import dataclass

_SHOWN = 6


@dataclass(frozen=True)
class CheckpointReport:
    """What matched, what was missing, what was left over.

    Attributes:
        layout: the layout that was recognised: official, mmpose1, transformers or kernelpose.
        matched: tensors that were taken over.
        missing: tensors that the model has and the checkpoint does not; they keep their values.
        left_over: tensors of the checkpoint that nothing took.
        notes: what was changed on the way: a resized position table, merged experts.

    `str(report)` is a short text for people.
    """

    layout: str
    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.layout} layout: {len(self.matched)} tensors matched"]
        for title, names in (("missing", self.missing), ("left over", self.left_over)):
            if names:
                more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                lines.append(f"  {title} ({len(names)}): {', '.join(names[:_SHOWN])}{more}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
