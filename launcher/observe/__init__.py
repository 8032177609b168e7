"""What a run tells: metrics.jsonl, the console, the logs of the ranks."""

from launcher.observe.reporter import Reporter, RunFacts, StepTiming, build_reporter

__all__ = ["Reporter", "RunFacts", "StepTiming", "build_reporter"]
