"""A command line becomes configurations: a project's own files first, sweeps checked before they start."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest

from launcher import conf
from launcher.config.compose import compose, experiments
from launcher.config.files import load_config, to_yaml
from launcher.config.prepare import Machine, prepare
from launcher.config.schema import Decay, Device, Dtype, RunConfig
from launcher.errors import ConfigurationError, JobError, RequestError
from tests.unit.composing import Recorder, composed, refused
from tests.unit.configs import good_config

SHIPPED = sorted(path.stem for path in (Path(str(conf.__file__)).parent / "experiment").glob("*.yaml"))
OWN = "# @package _global_\n# Mine.\nname: {name}\ntrain:\n  max_steps: 7\n"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("experiment", SHIPPED)
def test_every_shipped_experiment_composes_may_start_and_reads_back_equal(experiment: str, tmp_path: Path) -> None:
    config = composed(f"+experiment={experiment}", "device=cpu")
    prepare(config)
    assert config.name == experiment
    assert config.device is Device.cpu
    assert config.cluster.processes_per_node == 2
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


def test_overrides_and_groups_change_the_configuration() -> None:
    config = composed("+experiment=digits", "precision=bf16", "schedule=linear", "optimizer=sgd", "train.max_steps=5")
    assert config.precision.dtype is Dtype.bfloat16
    assert config.precision.loss_scale.enabled is False
    assert config.schedule.decay is Decay.linear
    assert config.optimizer["_target_"] == "torch.optim.SGD"
    assert config.train.max_steps == 5


def test_composing_leaves_no_trace_in_the_process() -> None:
    argv, environment, path = list(sys.argv), dict(os.environ), Path.cwd()
    logger, level = logging.getLogger("somebody.elses"), logging.getLogger().level
    first = composed("+experiment=digits", "seed=1")
    refused(["+experiment=digits", "sed=1"])
    assert composed("+experiment=digits", "seed=1") == first
    assert (sys.argv, dict(os.environ), Path.cwd()) == (argv, environment, path)
    assert not logger.disabled
    assert logging.getLogger().level == level
    assert list(path.iterdir()) == [], "Hydra made a folder"


def test_an_experiment_in_the_current_folder_is_found_and_wins() -> None:
    put(Path("conf/experiment/mine.yaml"), OWN.format(name="mine"))
    put(Path("conf/experiment/digits.yaml"), OWN.format(name="my_digits"))
    assert composed("+experiment=mine").name == "mine"
    assert composed("+experiment=digits").name == "my_digits"


def test_config_dir_wins_over_the_current_folder(tmp_path: Path) -> None:
    put(Path("conf/experiment/digits.yaml"), OWN.format(name="in_conf"))
    put(tmp_path / "elsewhere/experiment/digits.yaml", OWN.format(name="elsewhere"))
    assert composed("--config-dir", str(tmp_path / "elsewhere"), "+experiment=digits").name == "elsewhere"
    assert composed(f"--config-dir={tmp_path / 'elsewhere'}", "+experiment=digits").name == "elsewhere"
    assert composed("+experiment=digits").name == "in_conf"


def test_a_projects_files_end_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(Path("conf/experiment/digits.yaml"), OWN.format(name="my_digits"))
    assert composed("+experiment=digits").name == "my_digits"
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert composed("+experiment=digits").name == "digits"


def test_a_projects_own_primary_configuration_does_not_replace_the_shipped_one() -> None:
    put(Path("conf/config.yaml"), "unrelated: true\n")
    assert composed("+experiment=digits").name == "digits"


def test_experiments_are_listed_with_what_they_are_a_projects_own_first() -> None:
    put(Path("conf/experiment/zzz.yaml"), OWN.format(name="zzz"))
    put(Path("conf/experiment/digits.yaml"), OWN.format(name="digits"))
    found = experiments()
    assert [name for name, _ in found][:2] == ["digits", "zzz"]
    assert {name for name, _ in found} == {*SHIPPED, "zzz"}
    assert dict(found)["digits"] == "Mine."
    assert all(about for _, about in found)


def test_a_sweep_checks_every_run_before_the_first_starts() -> None:
    recorder = Recorder()
    compose(["-m", "+experiment=digits", "optimizer.lr=1e-3,1e-4"], recorder.prepare, recorder.command)
    assert recorder.order == [*["prepare"] * 2, *["prepare", "command"] * 2]
    assert [config.optimizer["lr"] for config in recorder.ran] == [1e-3, 1e-4]


def test_one_wrong_run_stops_a_sweep_before_it_starts() -> None:
    message = refused(["-m", "+experiment=digits", "train.max_steps=3,many"])
    assert "train.max_steps" in message
    assert "=many" in message


@pytest.mark.parametrize("kind", [ConfigurationError, JobError])
def test_a_run_that_cannot_work_stops_a_sweep_and_is_named(kind: type[RequestError]) -> None:
    recorder = Recorder()

    def prepare(config: RunConfig) -> list[str]:
        if config.seed == 2:
            raise kind("seed 2 is unlucky")
        return recorder.prepare(config)

    with pytest.raises(kind, match=r"In the sweep's run .*seed=2:\nseed 2 is unlucky"):
        compose(["-m", "+experiment=digits", "seed=1,2"], prepare, recorder.command)
    assert recorder.ran == []


@pytest.mark.parametrize("error", [ConfigurationError("no"), RuntimeError("crash"), KeyError("bug")])
def test_what_the_command_raises_arrives_as_it_is(error: Exception) -> None:
    def command(config: RunConfig, warnings: list[str]) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        compose(["+experiment=digits"], lambda config: [], command)
    assert caught.value is error


def test_showing_the_configuration_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    compose(["+experiment=digits", "--cfg", "job"], recorder.prepare, recorder.command)
    assert recorder.order == []
    assert "max_steps: 200" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["train: {max_stepps: 3}", "seed: many", "a: [", "- 1"])
def test_a_file_that_is_no_configuration_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"config\.yaml is not a run's configuration"):
        load_config(path)
    with pytest.raises(ConfigurationError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_processes_that_exist_already_are_taken_as_they_are() -> None:
    config = good_config()
    prepare(config, Machine(nodes=2, processes_per_node=1))
    assert (config.cluster.kind, config.cluster.nodes, config.cluster.processes_per_node) == ("torchrun", 2, 1)


@pytest.mark.parametrize(("num_gpus", "device", "workers"), [(0, Device.cpu, 2), (4, Device.cuda, 4)])
def test_automatic_means_one_worker_per_gpu_or_two_on_the_cpu(
    num_gpus: int, device: Device, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.config.prepare._num_gpus", lambda: num_gpus)
    config = good_config(device="auto", cluster__processes_per_node=None)
    prepare(config)
    assert (config.device, config.cluster.processes_per_node) == (device, workers)
