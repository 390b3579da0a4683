"""What made a number (commit, versions, machine), and files that are checked when read and replaced as a whole."""

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pydantic

from benchmark.suites import ROOT, BadSuite, first_sentence

Model = TypeVar("Model", bound=pydantic.BaseModel)
PACKAGES = ("torch", "numpy", "gymnasium", "envpool", "mujoco")


def provenance() -> dict:
    """Commit, whether the scripts are as committed (both None without git), versions, CPU, GPU, cores, threads."""
    import torch  # seconds, which `report` need not wait

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    try:
        commit, dirty = git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "*.py"))
    except OSError:  # no git on this machine
        commit, dirty = None, None
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "cpu": model.group(1) if model else platform.processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def read_as(model: type[Model], path: Path) -> Model | None:
    """A json file as that model; None if it is not there. Raises BadSuite, with file and key, for damage."""
    try:
        return model.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except pydantic.ValidationError as error:
        raise BadSuite(f"{path}: {first_sentence(error)}") from None
    except (OSError, ValueError) as error:
        raise BadSuite(f"{path} cannot be read: {error}") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` by the file that `write` makes at the path it is given; a crash leaves the old or the new."""
    new = path.with_name(path.name + ".new")
    try:
        write(new)
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # a full disk should not stay full of half a file
