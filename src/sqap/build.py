"""Which code this is: what numbers that were computed earlier must share with numbers computed now."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch

from sqap.kernels import cpu

__version__ = "0.2.0"
PACKAGE = Path(__file__).parent


def build_id() -> dict[str, str]:
    """Version and hash of the package, the path of its CPU kernels that is in use, and torch's version.

    Raises:
        InputError: SQAP_KERNELS names a path that does not run here.
    """
    return {
        "sqap": __version__,
        "package": package_hash(),
        "kernels": cpu.chosen(),
        "torch": torch.__version__,
    }


def build_and_processor() -> dict[str, str]:
    """`build_id`, the processor, and the instructions that PyTorch uses on it.

    The processor decides latencies, and by its instructions the order in which floats are added up.
    """
    return build_id() | {
        "processor": cpu.describe()["processor"],
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


@lru_cache(maxsize=1)
def package_hash() -> str:
    """SHA-256 over the package's Python files and the native extension that is loaded."""
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    if cpu._native is not None:  # an editable install may have it outside the package
        files["kernels/_native"] = Path(cpu._native.__file__)
    return hash_files(files)


def hash_files(files: dict[str, Path]) -> str:
    """SHA-256 over names and contents, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
