"""What preflight draws: rows in colour, lengths as bars in the terminal and as a picture."""

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

import numpy as np

from src.data.encoding import IGNORE_INDEX, THOUGHT, Encoder
from src.data.sets import EncodedSet
from src.errors import visible

BAR_WIDTH = 40
NUM_BARS = 10
MOST_TEXT = 1200  # characters of a row that are shown


class Paint:
    """Colours for a terminal; elsewhere signs around the text that say the same.

    Control characters of the text itself are written out.
    """

    PROMPT, ANSWER, THOUGHT, END, BOLD = "prompt", "answer", "thought", "end", "bold"

    def __init__(self, stream: TextIO) -> None:
        wanted = stream.isatty() or bool(os.environ.get("FORCE_COLOR"))
        self.in_colour = wanted and not os.environ.get("NO_COLOR")

    def __call__(self, kind: str, text: str) -> str:
        if not text:
            return ""
        text, (code, before, after, _) = visible(text), STYLES[kind]
        if self.in_colour:  # line by line, as a pager needs it
            return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in text.split("\n"))
        return f"{before}{text}{after}"

    @property
    def legend(self) -> str:
        """What the colours or signs mean."""
        return "   ".join(self(kind, meaning) for kind, (*_, meaning) in STYLES.items() if meaning)


STYLES = {  # the colour's code, the signs that stand for it elsewhere, and what it means
    Paint.PROMPT: ("2", "", "", "prompt"),
    Paint.ANSWER: ("0", "[", "]", "supervised: answer"),
    Paint.THOUGHT: ("36", "{", "}", "supervised: thought"),
    Paint.END: ("1;32", "<", ">", "supervised: end"),
    Paint.BOLD: ("1", "", "", ""),
}


def painted_row(rows: EncodedSet, index: int, encoder: Encoder, stop_ids: list[int], paint: Paint) -> str:
    """Show the decoded ids of a row, each part in the colour of what is done with it."""
    row = rows[index]
    ids, painted = row.input_ids, ""
    if row.target_ids is not None:
        ids, painted = row.target_ids, f"{paint(Paint.PROMPT, encoder.decode_all(ids.tolist()))}\n→ "
    kinds = np.full(len(ids), Paint.PROMPT, dtype=object)
    for kind, start, stop in row.spans.tolist():
        kinds[start:stop] = Paint.THOUGHT if kind == THOUGHT else Paint.ANSWER
    kinds[np.isin(ids, stop_ids) & (row.labels != IGNORE_INDEX)] = Paint.END
    stop = shown = 0
    for kind, run in itertools.groupby(kinds):
        start, stop = stop, stop + len(list(run))
        before, until = encoder.decode_all(ids[:start].tolist()), encoder.decode_all(ids[:stop].tolist())
        text = until[len(before) :] if until.startswith(before) else encoder.decode_all(ids[start:stop].tolist())
        painted += paint(kind, text[: max(0, MOST_TEXT - shown)])
        shown += len(text)
    return painted + (f" … ({shown:,} characters)" if shown > MOST_TEXT else "")


def histogram(lengths: np.ndarray, limit: int) -> Iterator[str]:
    """Yield lines of bars: how many rows have a length, in tokens; the bar that holds the limit says so."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    step = -(-(longest - shortest + 1) // NUM_BARS)
    edges = range(shortest, longest + step + 1, step)
    counts, _ = np.histogram(lengths, bins=np.array(edges))
    width = len(str(longest))
    for count, (start, stop) in zip(counts.tolist(), itertools.pairwise(edges), strict=True):
        bar = "█" * round(BAR_WIDTH * count / counts.max()) or ("▏" if count else "")
        mark = f"  ← data.max_seq_length {limit}" if start <= limit < stop else ""
        span = f"{start:>{width}}" if step == 1 else f"{start:>{width}}–{min(stop - 1, longest):<{width}}"
        yield f"{span} {bar} {count:,}{mark}"


def draw_lengths(sets: Mapping[str, EncodedSet], limit: int, file: Path) -> None:
    """Draw, for each set, how long its rows are and how much of each is supervised, as a PNG."""
    from matplotlib.figure import Figure  # heavy, and only this needs it
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 1 + 2.6 * len(sets)), layout="constrained")
    axes = figure.subplots(len(sets), 2, squeeze=False)
    for (name, rows), (left, right) in zip(sets.items(), axes, strict=True):
        lengths = rows.lengths + rows.target_lengths
        supervised = rows.supervised_lengths()
        left.hist(lengths, bins=40, color="#4878a8")
        median = np.median(lengths)
        left.axvline(median, color="#222222", linewidth=1, linestyle=":", label=f"median {median:.0f}")
        if limit <= 1.5 * lengths.max():
            left.axvline(limit, color="#c04040", linewidth=1, label=f"max_seq_length {limit}")
        left.legend(frameon=False, fontsize="small")
        left.set(title=f"{name}: {len(rows):,} rows", xlabel="tokens a row", ylabel="rows")
        right.hist(supervised / np.maximum(1, lengths), bins=40, range=(0, 1), color="#6aa06a")
        share = supervised.sum() / max(1, lengths.sum())
        right.set(title=f"{share:.0%} of all tokens supervised", xlabel="supervised share of a row", ylabel="rows")
        for axis in (left.xaxis, left.yaxis, right.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
