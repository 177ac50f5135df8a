"""The machine and its packages: versions, imports, devices, disk, shared memory, files, cores."""

from __future__ import annotations

import importlib
import importlib.util
import os
import resource
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cascade.doctor.findings import Finding, error, ok, some, warning
from internvl.memory import GIB

PACKAGE = "internvl-posttraining"
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"  # in a checkout
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = GIB  # Docker's default is 64 MiB
_IMPORTED = ("torch", "torchvision", "transformers")


@dataclass(frozen=True)
class Demand:
    """What the recipe asks of the machine.

    processes: of one training stage on this machine. workers: of one process's loader, the most
    of any stage. examples: of one step of such a process. disk: bytes that the run will write.
    """

    processes: int = 1
    workers: int = 0
    examples: int = 1
    disk: int = 0


def check_environment(output: Path, demand: Demand) -> list[Finding]:
    """All of this module's checks; output: where the run will write."""
    return [
        *check_versions(installed_version, requirements(), tried_versions()),
        *check_imports(),
        *check_devices(demand.processes),
        *check_disk(output, demand.disk),
        *check_limits(demand),
    ]


# ---------------------------------------------------------------- versions


def installed_version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> list[str]:
    """What this project asks for, as it was installed; extras too, with their marker."""
    try:
        return metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []


def tried_versions() -> dict[str, str]:
    """constraints.txt: the versions that were tried together; empty outside a checkout."""
    if not CONSTRAINTS.is_file():
        return {}
    lines = (line.split("#")[0].strip() for line in CONSTRAINTS.read_text("utf-8").splitlines())
    return dict(line.split("==", 1) for line in lines if "==" in line)


def check_versions(
    installed: Callable[[str], str | None], wanted: Iterable[str], tried: Mapping[str, str]
) -> list[Finding]:
    """Installed packages against the ranges that the code needs, and the versions that were tried.

    An extra's package may be absent; one that is there must be in its range.
    """
    from packaging.requirements import Requirement
    from packaging.version import Version

    found: list[Finding] = []
    others, good = [], 0
    for text in wanted:
        requirement = Requirement(text)
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        if requirement.name == PACKAGE:
            continue
        version, asked = installed(requirement.name), f"{requirement.name}{requirement.specifier}"
        cure = f"pip install '{asked}'"
        if version is None:
            if not optional:
                found.append(error("environment.versions", f"{asked} is not installed", cure=cure))
        elif not requirement.specifier.contains(version, prereleases=True):
            told = f"{requirement.name} {version} is installed, and {asked} is what the code needs"
            found.append(error("environment.versions", told, cure=cure))
        else:
            good += 1
            known = tried.get(requirement.name)
            if known is not None and Version(known).public != Version(version).public:
                others.append(f"{requirement.name} {version} (tried: {known})")
    if not found:
        told = f"{good} packages are in their ranges"
        told += f"; other than tried: {some(others, 4)}" if others else ", all as tried"
        found.append(ok("environment.versions", told if tried else f"{good} in their ranges"))
    return found


def check_imports(names: Sequence[str] = _IMPORTED) -> list[Finding]:
    """Whether the packages that everything needs can be imported beside each other."""
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError, OSError) as fault:  # torchvision's is a RuntimeError
            told = f"{name} cannot be imported: {' '.join(str(fault).split())[:200]}"
            cure = "python scripts/setup_env.py --cure-only (or: rm -rf .venv && make .venv)"
            return [error("environment.imports", told, cure=cure)]
    return [ok("environment.imports", f"{', '.join(names)} import")]


def has_vllm() -> bool:
    """Whether vLLM is installed; it is imported where an engine is started."""
    return importlib.util.find_spec("vllm") is not None


def vllm_on_cpu() -> bool:
    """Whether the vLLM that is installed runs on the CPU."""
    if not has_vllm():
        return False
    import torch

    return not torch.cuda.is_available()


# ---------------------------------------------------------------- devices


def check_devices(processes: int) -> list[Finding]:
    """GPUs, their memory, and whether there are as many as processes."""
    import torch

    if torch.cuda.is_available():
        return _check_gpus(processes)
    cores = len(os.sched_getaffinity(0))
    if shutil.which("nvidia-smi") is not None and Path("/proc/driver/nvidia/gpus").is_dir():
        told = f"the driver lists a GPU, but torch {torch.__version__} cannot use it"
        cure = "install torch's CUDA build (make .venv VLLM=cuda), and see CUDA_VISIBLE_DEVICES"
        return [error("environment.gpu", told, cure=cure)]
    flash = "" if importlib.util.find_spec("flash_attn") is None else ", flash-attn is installed"
    return [ok("environment.gpu", f"no GPU: everything runs on {cores} CPU cores{flash}")]


def _check_gpus(processes: int) -> list[Finding]:
    import torch

    number = torch.cuda.device_count()
    if processes > number:
        told = f"{processes} processes are launched on this machine, which has {number} GPU(s)"
        cure = f"launch: {{num_processes: {number}}}"
        return [error("environment.gpu", told, "launch", cure=cure)]
    rooms = [torch.cuda.mem_get_info(device) for device in range(number)]
    free, total = min(rooms)
    name = torch.cuda.get_device_name(0)
    told = f"{number} x {name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free on the fullest"
    if free < 0.8 * total:
        cure = "end what holds the memory (nvidia-smi), or choose other CUDA_VISIBLE_DEVICES"
        return [warning("environment.gpu", told, cure=cure)]
    return [ok("environment.gpu", told)]


# ---------------------------------------------------------------- disk, memory, files, cores


def check_disk(output: Path, needed: int) -> list[Finding]:
    """Whether checkpoints and results fit on the disk that the run writes to."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    told = f"the run writes about {gib(needed)} GiB (checkpoints and results), {gib(free)} are free"
    if needed > free:
        cure = "--output on a larger disk, or save_total_limit: 1 and save_only_model in the stages"
        return [error("environment.disk", told, str(place), cure=cure)]
    return [ok("environment.disk", told, str(place))]


def check_limits(demand: Demand, shared: Path = SHARED_MEMORY) -> list[Finding]:
    """Shared memory and open files for loaders' workers, and cores for all processes."""
    found = []
    size = shutil.disk_usage(shared).total if shared.is_dir() else 0
    uses_shared = demand.workers > 0 or demand.processes > 1
    if uses_shared and size < LEAST_SHARED:
        told = f"{shared} has {size / 2**20:.0f} MiB; loaders' workers and NCCL go through it"
        cure = "docker run --shm-size=16g (or --ipc=host), or dataloader_num_workers: 0"
        found.append(error("environment.shm", told, str(shared), cure=cure))
    # a worker hands over each tensor by a file of its own, two steps ahead
    files = 256 + 2 * demand.workers * demand.examples
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if demand.workers and soft != resource.RLIM_INFINITY and files > soft:
        told = f"about {files:,} open files are needed for the loaders' workers, {soft:,} allowed"
        cure = "ulimit -n 65536"
        found.append(error("environment.files", told, "ulimit -n", cure=cure))
    cores, busy = len(os.sched_getaffinity(0)), demand.processes * (1 + demand.workers)
    if busy > 2 * cores:
        told = f"{busy} processes (trainers and their loaders' workers) for {cores} cores"
        cure = f"dataloader_num_workers: {max(0, cores // demand.processes - 1)}"
        found.append(warning("environment.cores", told, cure=cure))
    told = f"{cores} cores, {gib(size)} GiB of shared memory, {soft:,} open files"
    return found or [ok("environment.limits", told)]


def gib(size: float) -> str:
    """Bytes as GiB, small ones with more digits."""
    return f"{size / GIB:,.1f}" if size >= GIB else f"{size / GIB:.2f}"
