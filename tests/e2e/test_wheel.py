"""The wheel holds everything, and trains the demo from a clean environment in another folder."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z", "launcher", "conf", "jobs", "pyproject.toml", "README.md"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, files):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    completed = subprocess.run(build, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_every_configuration_and_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("conf", "*.yaml"), ("jobs", "*.py"), ("launcher", "*.py")):
        for path in (REPOSITORY / folder).rglob(pattern):
            relative = path.relative_to(REPOSITORY).as_posix()
            expected = relative if folder == "launcher" else f"launcher/{relative}"
            assert expected in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"launcher", next(top for top in tops if top.endswith(".dist-info"))}


def test_the_wheel_trains_the_demo_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=120)
    python = environment / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    # The dependencies are those of the running environment, which pip would install again for a gigabyte.
    # Behind the clean environment's own, and without the .pth files that make this repository importable.
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    folder = tmp_path / "another folder"
    folder.mkdir()
    where = [str(python), "-c", "import launcher, launcher.conf, launcher.jobs; print(launcher.__file__)"]
    found = subprocess.run(where, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found).is_relative_to(site)
    command = [str(environment / "bin" / "launch"), "+experiment=digits"]
    completed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert completed.returncode == 0, completed.stderr
    assert "finished: step 200" in completed.stdout
