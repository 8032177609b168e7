"""From what the nodes have measured to a table and the names of those that are slow. No torch, no network."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

__all__ = ["NodeReport", "problems", "rounds", "table"]

_SLOW = 0.7
"""Of what the others reach."""


@dataclass(frozen=True)
class NodeReport:
    """One node's measurements."""

    host: str
    address: str
    speeds: dict[str, float] = field(default_factory=dict)
    """GB/s of an all-reduce with each partner."""
    milliseconds: float = 0.0
    """Of the smallest all-reduce with its first partner."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why it could not reach a partner."""

    @property
    def best(self) -> float:
        """Its speed: with the best partner, since a slow partner makes any node look slow."""
        return max(self.speeds.values(), default=0.0)


def rounds(num_nodes: int, partners: int) -> list[list[tuple[int, int]]]:
    """Who meets whom: in each round every node has one partner at most (the circle method), and never the same twice.

    Args:
        num_nodes: those that are there.
        partners: rounds at most; with ``num_nodes`` or more everybody meets everybody.
    """
    circle: list[int | None] = [*range(num_nodes), *([None] * (num_nodes % 2))]
    found = []
    for _ in range(min(partners, len(circle) - 1)):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(one, other), max(one, other)) for one, other in pairs if None not in (one, other)])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def problems(reports: list[NodeReport], missing: list[str], at_least: float | None) -> list[str]:
    """One line for each thing that is wrong; empty if all is well.

    Args:
        reports: of the nodes that were there to the end.
        missing: nodes that were not.
        at_least: GB/s that every pair must reach; None: no floor, nodes are compared with each other alone.
    """
    lines = [f"missing: {host}" for host in missing]
    alone = [report for report in reports if report.failures and not report.speeds]
    lines += [f"unreachable: {report.host} ({next(iter(report.failures.values()))})" for report in alone]
    usual = median([report.best for report in reports if report.speeds] or [0.0])
    slow = [report for report in reports if report.speeds and report.best < _SLOW * usual]
    lines += [f"slow: {report.host} ({report.best:.3g} GB/s at best, the others {usual:.3g})" for report in slow]
    named = {report.host for report in [*alone, *slow]} | set(missing)
    bests = {report.host: report.best for report in reports}
    for report in reports:
        for partner, reason in report.failures.items():
            if report.host < partner and not {report.host, partner} & named:
                lines.append(f"no way between {report.host} and {partner} ({reason})")
        for partner, speed in report.speeds.items():
            if report.host >= partner or {report.host, partner} & named:
                continue
            expected = max(_SLOW * min(report.best, bests.get(partner, 0.0)), at_least or 0.0)
            if speed < expected:
                lines.append(f"slow between {report.host} and {partner} ({speed:.3g} GB/s, expected {expected:.3g})")
    return lines


def table(reports: list[NodeReport]) -> str:
    """A line per node, the slowest first."""
    rows = [("node", "address", "best GB/s", "median", "worst", "with", "ms")]
    for report in sorted(reports, key=lambda report: report.best):
        speeds = report.speeds or {"nobody": 0.0}
        worst = min(speeds, key=speeds.__getitem__)
        numbers = [f"{value:.3g}" for value in (report.best, median(speeds.values()), speeds[worst])]
        rows.append((report.host, report.address, *numbers, worst, f"{report.milliseconds:.2f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
