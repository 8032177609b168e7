"""Takes a run directory up again, as its next attempt: a program for tests, apart from the command.

``python resume.py RUN ATTEMPT WORKERS [KEY=VALUE …]`` changes config.yaml and starts the workers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import OmegaConf

from launcher.clusters.agent import StopForwarder, WorkersDiedError, run_workers
from launcher.rundir import RunDirectory
from launcher.rundir.failures import first_failure


def main() -> int:
    run, attempt, workers = RunDirectory(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    sys.path.insert(0, str(Path.cwd()))
    config = OmegaConf.merge(OmegaConf.load(run.config), OmegaConf.from_dotlist(sys.argv[4:]))
    config.cluster.processes_per_node = workers
    OmegaConf.save(config, run.config)
    forwarder = StopForwarder()
    with forwarder.listening():
        try:
            outcomes = run_workers(run.path, attempt, workers, run.agent_log(attempt, 0), forwarder)
        except WorkersDiedError:
            failure = first_failure(run, attempt)
            print(failure)
            return failure.exit_code if failure else 1
    return 0 if outcomes[0].finished else 75


if __name__ == "__main__":
    sys.exit(main())
