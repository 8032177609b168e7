"""The files in a submission's folder by which the nodes of a job find each other, or say why they cannot."""

from __future__ import annotations

from pathlib import Path

__all__ = ["address_file", "complaint_file", "first_node_problem"]


def address_file(folder: Path, job_id: str, turn: int) -> Path:
    """Where the first node says how the others reach it."""
    return folder / f"first-node-{job_id}-{turn}.json"


def complaint_file(folder: Path, job_id: str, turn: int, node: int) -> Path:
    """Where another node says why it cannot come."""
    return folder / f"node-{node}-{job_id}-{turn}.problem"


def first_node_problem(folder: Path, job_id: str, turn: int | str) -> Path:
    """Where the others say that the first node has not come; the batch file reads it."""
    return folder / f"first-node-{job_id}-{turn}.problem"
