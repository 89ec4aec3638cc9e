"""What `make setup` does before and around pip, with stand-ins for whatever it would call."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SYSTEM_PACKAGES = ROOT / "scripts" / "system-packages"
# Installs g++ as Debian's does, so far as the script can tell.
APT = """#!/bin/sh
echo "$*" >> "$HERE/apt.log"
case "$*" in *g++*) /bin/cp "$HERE/true" "$HERE/g++" ;; esac
"""
# Python's own checks, as another release.
PYTHON = f"""#!/bin/sh
exec {sys.executable} -c '
import ctypes.util, sys, sysconfig
sys.version_info = ({{}}, 0)
ctypes.util.find_library = lambda name: {{}}
{{}}
code, sys.argv = sys.argv[2], sys.argv[2:]
exec(code)' "$@"
"""


class Machine:
    """A PATH with nothing on it but what a test puts there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.put("true", "#!/bin/sh\n")
        self.put("env", '#!/bin/sh\nshift\nexec "$@"\n')  # drops DEBIAN_FRONTEND, which the stand-in ignores
        self.python("3, 12", "None")

    def put(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)
        (self.path / name).chmod(0o755)

    def python(self, version: str, osmesa: str, more: str = "") -> None:
        self.put("python3", PYTHON.format(version, osmesa, more))

    def run(self, *needs: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", SYSTEM_PACKAGES, *needs],
            env={"PATH": str(self.path), "HERE": str(self.path)},
            capture_output=True,
            text=True,
        )

    @property
    def apt_calls(self) -> list[str]:
        log = self.path / "apt.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def be_root(machine: Machine) -> None:
    machine.put("id", "#!/bin/sh\necho 0\n")


def be_a_sudoer(machine: Machine) -> None:
    machine.put("id", "#!/bin/sh\necho 1000\n")
    machine.put("sudo", '#!/bin/sh\n[ "$1" = -n ] && shift && exec "$@"\n')


def be_a_user(machine: Machine) -> None:
    machine.put("id", "#!/bin/sh\necho 1000\n")
    machine.put("sudo", "#!/bin/sh\necho a password is required >&2\nexit 1\n")


@pytest.mark.parametrize("become", [be_root, be_a_sudoer])
def test_what_lacks_is_installed_and_that_is_said(become: Callable[[Machine], None], machine):
    become(machine)
    machine.put("apt-get", APT)
    done = machine.run("compiler")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "This system lacks a C++ compiler. Installing g++.\n"
    update, install = machine.apt_calls
    assert update.startswith("update")
    assert install.startswith("install -y")
    assert install.endswith(" g++")
    assert machine.run("compiler").stdout == ""
    assert len(machine.apt_calls) == 2, "nothing lacks any more"


def test_what_may_not_be_installed_is_named_in_one_sentence(machine):
    be_a_user(machine)
    machine.put("apt-get", APT)
    done = machine.run("compiler", "osmesa")
    assert done.returncode == 1
    assert machine.apt_calls == []
    (sentence,) = done.stderr.splitlines()
    assert "lacks: a C++ compiler, OSMesa to draw with" in sentence
    assert sentence.endswith("Install it: sudo apt-get install g++ libosmesa6")


def test_a_system_without_apt_is_told_what_the_packages_are_called_elsewhere(machine):
    be_root(machine)
    done = machine.run("compiler", "arm")
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence.endswith("Debian's packages with it are called g++ g++-aarch64-linux-gnu qemu-user.")


def test_what_apt_did_not_bring_is_said(machine):
    be_root(machine)
    machine.put("apt-get", "#!/bin/sh\n")
    done = machine.run("osmesa")
    assert done.returncode == 1
    assert "sqap still lacks OSMesa" in done.stderr
    machine.put("apt-get", "#!/bin/sh\nexit 100\n")
    done = machine.run("osmesa")
    assert done.returncode == 1
    assert "apt-get could not install libosmesa6" in done.stderr
    machine.python("3, 12", '"libOSMesa.so.8"')
    assert machine.run("osmesa").returncode == 0


def test_python_is_installed_or_refused(machine):
    be_a_user(machine)
    machine.put("apt-get", APT)
    (machine.path / "python3").unlink()
    assert machine.run("python").stderr.endswith("apt-get install python3 python3-venv python3-dev\n")
    machine.python("3, 9", "None")
    done = machine.run("python")
    assert (done.returncode, done.stderr.splitlines()) == (
        1,
        ["sqap runs on Python 3.10 to 3.13, but python3 is 3.9; name another: make setup PYTHON=python3.12"],
    )


@pytest.mark.parametrize(
    ("lacking", "package"),
    [
        ('sys.modules["ensurepip"] = None', "python3-venv"),
        ('sys.modules["venv"] = None', "python3-venv"),
        ('sysconfig.get_path = lambda name: "/"', "python3-dev"),
    ],
)
def test_a_python_without_all_its_parts_is_noticed(machine, lacking: str, package: str):
    be_a_user(machine)
    machine.put("apt-get", APT)
    machine.python("3, 12", "None", lacking)
    done = machine.run("python")
    assert done.returncode == 1
    assert done.stderr.endswith(f"Install it: sudo apt-get install {package}\n")


# Makes an environment of itself, and writes down what it is told.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> {log}
if [ "$2" = venv ]; then mkdir -p .venv/bin && cp "$0" .venv/bin/python; fi
"""


class Project:
    """What `make setup` needs of the repository, with one module, and a Python that does nothing."""

    def __init__(self, path: Path) -> None:
        self.path, self.log, self.modules = path, path / "log", path / "src" / "sqap"
        python = path / "python"
        python.write_text(FAKE_PYTHON.format(log=self.log))
        python.chmod(0o755)
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "CMakeLists.txt"):
            shutil.copy(ROOT / name, path)
        shutil.copytree(ROOT / "scripts", path / "scripts")
        self.modules.mkdir(parents=True)
        (self.modules / "a.py").touch()

    def setup(self, compiler: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """By the make that is here, whatever PATH there is."""
        usual = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(
            [str(shutil.which("make")), "setup", f"PYTHON={self.path / 'python'}", f"CXX={compiler}"],
            cwd=self.path,
            env=usual | {"MUJOCO_GL": "egl"} | environment,
            capture_output=True,
            text=True,
        )


@pytest.fixture
def project(tmp_path: Path) -> Project:
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    return Project(tmp_path)


def test_nothing_is_made_or_downloaded_where_something_lacks(project: Project, tmp_path: Path):
    """Neither apt-get nor sudo nor a compiler is on this PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "uname", "find", "sort", "cksum", "cut", "mkdir", "cp", "rm", "touch"):
        (tools / name).symlink_to(str(shutil.which(name)))
    done = project.setup("no-compiler", PATH=str(tools))
    assert done.returncode != 0
    assert "sqap needs what this system lacks: a C++ compiler." in done.stderr
    assert "-m venv" not in project.log.read_text()
    assert "-m pip" not in project.log.read_text()
    assert not (tmp_path / ".venv").exists()
    assert project.setup("sh", PATH=str(tools)).returncode == 0, "nothing else lacks"


def test_setup_is_done_anew_when_the_list_of_modules_changes(project: Project):
    """An editable install has the list of modules of the day it was made."""
    modules = project.modules

    def installs() -> int:
        done = project.setup("sh")
        assert done.returncode == 0, done.stderr
        return project.log.read_text().count("pip install")

    assert [installs(), installs()] == [1, 1]
    (modules / "a.py").write_text("changed = True")
    assert installs() == 1
    (modules / "b.py").touch()
    assert [installs(), installs()] == [2, 2]
    (modules / "b.py").rename(modules / "c.py")
    assert [installs(), installs()] == [3, 3]
    (modules / "c.py").unlink()
    assert [installs(), installs()] == [4, 4], "a stamp of before is no proof of now"
