"""Checks a wheel in an environment that has it installed: python -I scripts/check_wheel.py WHEEL

What it must hold and must not, and that it works on a machine without a compiler: it has every path of the
kernels, those that run on this processor compute what plain C++ does, and the bundled policy is compressed
and acts.
"""

from __future__ import annotations

import platform
import shutil
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

POLICY = [f"sqap/assets/reference/{name}" for name in ("model.safetensors", "policy.json", "tokenizer.json")]
# Of each kind of machine, the kernels' paths that a wheel has.
X86 = {"amx", "avx512vnni", "avxvnni", "avx2", "portable", "reference"}
ARM = {"neon", "portable", "reference"}
PATHS = {"x86_64": X86, "AMD64": X86, "aarch64": ARM, "arm64": ARM}
COMPILERS = "cc", "c++", "gcc", "g++", "clang", "clang++", "cmake", "ninja"


def contents(wheel: Path) -> list[str]:
    """What is wrong with the files in a wheel."""
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    wrong = [f"{name} is missing" for name in POLICY if name not in names]
    if sum(name.startswith("sqap/kernels/cpu/_native.") for name in names) != 1:
        wrong.append("there is not exactly one native extension")
    for name in names:
        if Path(name).suffix in (".cpp", ".h", ".hpp", ".o", ".a", ".pyc"):
            wrong.append(f"{name} should not be there")
        if name.split("/")[0] not in ("sqap", *[n.split("/")[0] for n in names if ".dist-info/" in n]):
            wrong.append(f"{name} is outside of the package")
    return wrong


def kernels() -> list[str]:
    """What is wrong with the native kernels."""
    from sqap.kernels import cpu

    found = cpu.describe()["paths"]
    names, expected = {path["name"] for path in found}, PATHS[platform.machine()]
    wrong = [f"the path {name} is not in it" for name in expected - names]
    return wrong + [f"the path {p['name']} computes {p['differs']}" for p in found if p["differs"]]


def act() -> list[str]:
    """What is wrong with a step of the bundled policy, as it is and compressed."""
    import numpy as np

    import sqap

    policy = sqap.load("reference")
    images = {
        name: np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        for name in policy.config.cameras
    }
    observation = sqap.Observation(images, "open the drawer")
    small = sqap.compress(policy, sqap.Recipe.w4a8(), [observation])
    chunk, expected = small.act(observation, seed=0), policy.act(observation, seed=0)
    off = float(np.abs(chunk - expected).max() / np.abs(expected).max())
    print(f"acted: a chunk of {chunk.shape}; compressed, it is {off:.3f} of the largest action off")
    return [] if off < 0.5 else ["the compressed policy acts otherwise"]


def main() -> None:
    wheel = Path(sys.argv[1])
    wrong = contents(wheel)
    if tools := [name for name in COMPILERS if shutil.which(name)]:
        wrong.append(f"this environment has a compiler: {', '.join(tools)}")
    import sqap

    where = Path(sqap.__file__)
    if not where.is_relative_to(sysconfig.get_path("purelib")):
        wrong.append(f"sqap was imported from {where}, which no wheel was installed to")
    if f"-{sqap.__version__}-" not in wheel.name:
        wrong.append(f"the package is {sqap.__version__}")
    wrong += kernels() + act()
    for line in wrong:
        print(f"{wheel.name}: {line}", file=sys.stderr)
    print(f"{wheel.name}: {'wrong' if wrong else 'right'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
