"""What a user gets from `pip install`: the wheel is built, read and run, away from the checkout."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cascade", "internvl", "mmpr", "mpo", "rewards", "rl", "sft", "training")
DATA = (".html", ".j2", ".css", ".js", ".yaml", ".json")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def source_files() -> set[str]:
    """All that must be in the wheel, as paths relative to the checkout."""
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.suffix == ".py" or path.suffix in DATA:
                found.add(path.relative_to(ROOT).as_posix())
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # From a copy: setuptools leaves build/ behind, and would put stale files from it into the next
    # wheel. The copy has tests/ and examples/ too, or their absence would prove nothing.
    copy = tmp_path_factory.mktemp("source") / "copy"
    hidden = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=hidden)
    assert (copy / "tests").is_dir()
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", out, copy, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile")
    run(*pip, "--target", target, wheel, cwd=target)
    return target


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == set(PACKAGES)


def test_wheel_holds_every_module_and_data_file(wheel):
    assert source_files() - set(zipfile.ZipFile(wheel).namelist()) == set()


def test_wheel_carries_the_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def scripts() -> dict[str, str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("name", sorted(scripts()))
def test_commands_run_away_from_the_checkout(installed, tmp_path, name):
    module, function = scripts()[name].split(":")
    # The target folder comes first, so what runs is the wheel and not the editable install.
    code = (
        f"import sys, {module} as cli\n"
        f"assert cli.__file__.startswith({str(installed)!r}), cli.__file__\n"
        f"sys.argv = [{name!r}, '--help']\n"
        f"cli.{function}()"
    )
    shown = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "usage" in shown.lower()


@pytest.mark.parametrize("package", [p for p in PACKAGES if (ROOT / p / "__main__.py").exists()])
def test_packages_run_away_from_the_checkout(installed, tmp_path, package):
    shown = run(sys.executable, "-m", package, "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "usage" in shown.lower()
