"""What the measurements of a workload say: whether losses agree, medians and ratios, as a table and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from benchmarks.speed.measurement import Measurement
from benchmarks.speed.workloads import WAYS, Way, Workload
from src import markdown
from src.figures import Figure, Series
from src.util import in_words

TOLERANCES = {"no": 1e-4, "bf16": 3e-2}
"""How far losses of the same step may be apart, in nats, by mixed precision."""
COLUMNS = ("way", "tokens/s (range)", "supervised/s", "ratio", "peak memory", "of peak", "padding", "losses")

SUMMARY = (
    "workload",
    "tokens/s",
    "to TRL's defaults",
    "to the fastest of the others",
    "peak memory",
    "to the bare loop",
)


@dataclass(frozen=True)
class Results:
    """All measurements of a workload, of each way that did not fail one a round."""

    workload: Workload
    mixed_precision: str  # no or bf16
    rounds: Mapping[str, Sequence[Measurement]]
    measured: str = ""  # when, on which machine, how often

    @classmethod
    def read(cls, workload: Workload, stored: Mapping[str, Any]) -> Self:
        """Read what `as_dict` gave."""
        rounds = {way: [Measurement(**one) for one in each] for way, each in stored["rounds"].items() if way in WAYS}
        return cls(workload, stored["mixed_precision"], rounds, stored["measured"])

    def as_dict(self) -> dict[str, Any]:
        rounds = {way: [asdict(one) for one in each] for way, each in self.rounds.items()}
        return {"measured": self.measured, "mixed_precision": self.mixed_precision, "rounds": rounds}

    @property
    def base(self) -> str | None:
        """What the ratios are to: TRL with its defaults, else what comes next to it."""
        return next((name for name in ("trl_default", "trl", "trainer", "bare") if name in self.rounds), None)

    @property
    def peak_flops(self) -> float:
        """Return what products of large matrices reached, the median of all processes."""
        return statistics.median(one.peak_flops for each in self.rounds.values() for one in each)

    def median(self, way: str, value: Callable[[Measurement], float]) -> float:
        return statistics.median(value(one) for one in self.rounds[way])

    def speed(self, way: str) -> float:
        return self.median(way, lambda one: one.tokens_per_second)

    def ratio(self, way: str, other: str) -> float:
        """Return how many times as many tokens a second a way makes as another: the median over rounds."""
        pairs = zip(self.rounds[way], self.rounds[other], strict=True)
        return statistics.median(one.tokens_per_second / two.tokens_per_second for one, two in pairs)

    def fastest(self, belongs: Callable[[Way], bool]) -> str | None:
        names = [name for name in self.rounds if belongs(WAYS[name])]
        return max(names, key=self.speed, default=None)

    def disagreements(self) -> list[str]:
        """Return where losses differ that have to agree: of ways that feed the same batches, at every step."""
        ways = [WAYS[name] for name in self.rounds if WAYS[name].follows_order]
        orders = dict.fromkeys(way.batching for way in ways)
        return [one for order in orders for one in self._disagreements([w.name for w in ways if w.batching == order])]

    def _disagreements(self, names: Sequence[str]) -> list[str]:
        tolerance = TOLERANCES["bf16" if self.workload.dtype == "bfloat16" else self.mixed_precision]
        ordered = [(name, one) for name in names for one in self.rounds[name]]
        first, reference = ordered[0]
        found = []
        for name, one in ordered[1:]:
            pairs = list(zip(one.losses, reference.losses, strict=False))
            if len(one.losses) != len(reference.losses):
                found.append(f"{name} made {len(one.losses)} steps, {first} {len(reference.losses)}")
            far = [step for step, (loss, other) in enumerate(pairs, 1) if not abs(loss - other) <= tolerance]
            if far:
                loss, other = pairs[far[0] - 1]
                found.append(f"step {far[0]}: the loss of {name} is {loss:.6f}, that of {first} {other:.6f}")
        return found

    def table(self) -> list[list[str]]:
        """Return the cells of each way, see COLUMNS."""
        return [self._cells(name) for name in self.rounds]

    def _cells(self, name: str) -> list[str]:
        each = self.rounds[name]
        speeds = [one.tokens_per_second for one in each]
        first, last = each[0].losses[0], each[0].losses[-1]
        return [
            WAYS[name].about,
            f"{self.speed(name):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})",
            f"{self.median(name, lambda one: one.supervised_per_second):,.0f}",
            "" if self.base is None else f"{self.ratio(name, self.base):.2f}",
            f"{self.median(name, lambda one: one.peak_memory_bytes) / 2**30:.2f} GiB",
            f"{self.median(name, lambda one: one.needed_flops_per_second) / self.peak_flops:.0%}",
            f"{each[0].padding:.0%}",
            f"{first:.4f} to {last:.4f}" + ("" if WAYS[name].follows_order else " (own order)"),
        ]

    @property
    def ours(self) -> str | None:
        return self.fastest(lambda way: way.trainer == "towline")

    @property
    def best_peer(self) -> str | None:
        return self.fastest(lambda way: way.is_peer)

    def memory_ratio(self) -> float | None:
        """Return the peak memory of Towline's padded way relative to the base's."""
        if "towline" not in self.rounds or self.base in (None, "bare"):
            return None
        ours, theirs = (self.median(way, lambda one: one.peak_memory_bytes) for way in ("towline", self.base))
        return ours / theirs

    def sentences(self) -> list[str]:
        """Return what the table shows: ours beside the peers' best, beside the bare loop, and in memory."""
        said = []
        if (ours := self.ours) is not None and (best := self.best_peer) is not None:
            ratio = f"{self.ratio(ours, best):.2f} times as many tokens a second"
            said.append(f"Towline at its fastest ({WAYS[ours].batching}) makes {ratio} as {WAYS[best].about}")
        if {"towline", "bare"} <= self.rounds.keys():
            said.append(f"Towline's loop runs at {self.ratio('towline', 'bare'):.2f} of the bare one's speed")
        if (base := self.base) is not None and (of_base := self.memory_ratio()) is not None:
            said.append(f"Padded, its peak memory is {of_base:.2f} times that of {WAYS[base].about}")
        said.append(f"Matrix products reach {self.peak_flops / 1e9:,.0f} GFLOP/s here")
        return [one + "." for one in said]

    def summary(self) -> list[str]:
        """Return the cells of this workload in the table of all, see SUMMARY."""
        ours, best, of_base = self.ours, self.best_peer, self.memory_ratio()
        return [
            f"`{self.workload.name}`",
            "" if ours is None else f"{self.speed(ours):,.0f}",
            "" if ours is None or "trl_default" not in self.rounds else f"{self.ratio(ours, 'trl_default'):.2f}",
            "" if ours is None or best is None else f"{self.ratio(ours, best):.2f} ({WAYS[best].about})",
            "" if of_base is None else f"{of_base:.2f}",
            f"{self.ratio('towline', 'bare'):.2f}" if {"towline", "bare"} <= self.rounds.keys() else "",
        ]


def as_markdown(results: Results) -> str:
    """Return a workload's section: its table, and what it shows."""
    said = results.sentences()
    if results.base is not None:
        said.insert(0, f"Ratios are of tokens/s, to {WAYS[results.base].about}.")
    table = markdown.table(COLUMNS, results.table())
    heading = f"## {results.workload.name}: {results.workload.about}"
    paragraphs = [heading, results.measured, table, " ".join(said)]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def as_summary(all_results: Sequence[Results]) -> str:
    """Return a table with a row for each workload, and what its columns are."""
    about = "Tokens/s of Towline at its fastest, and their ratios to those of others; peak memory of its padded way, "
    about += "relative to what the ratios of the workload's own table are to."
    return f"{markdown.table(SUMMARY, [results.summary() for results in all_results])}\n\n{about}\n"


def as_figure(all_results: Sequence[Results]) -> Figure:
    """Return a figure of every way's speed in every workload, relative to the base of each."""
    names = list(dict.fromkeys(name for results in all_results for name in results.rounds))
    series = []
    for name in names:
        points = [
            (float(place), results.ratio(name, results.base))
            for place, results in enumerate(all_results, start=1)
            if name in results.rounds and results.base is not None
        ]
        x, y = ([point[i] for point in points] for i in (0, 1))
        series.append(Series(WAYS[name].about, x, y, "points"))
    bases = dict.fromkeys(WAYS[results.base].about for results in all_results if results.base is not None)
    return Figure(
        "speed",
        f"Tokens per second, relative to {in_words(bases, 'or')}",
        "",
        "times as many tokens per second",
        series,
        names=[f"{results.workload.name}: {results.workload.about}" for results in all_results],
    )
