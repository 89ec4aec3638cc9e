"""Faults of checkpoint directories, drawn by hypothesis: what is done to a file, and what must come of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal

from hypothesis import strategies as st

MANIFEST = "policy.json"
# What is beside it for LeRobot and for people, and is not read.
BESIDE = ("config.json", "policy_preprocessor.json", "policy_postprocessor.json", "README.md")


class Effect(Enum):
    """What a directory with a fault may do, besides being refused."""

    EQUAL = "act as before"
    CHANGED = "act otherwise, in finite numbers"
    REFUSED = "nothing"


@dataclass(frozen=True)
class Mutation:
    """A fault of one file: ``apply`` puts it there, or leaves the file as it is where it does not go."""

    file: str
    what: str
    effect: Effect
    apply: Callable[[Path], None]

    def __repr__(self) -> str:
        return f"<{self.file}: {self.what}>"


def weighted(*choices: tuple[int, st.SearchStrategy[Mutation]]) -> st.SearchStrategy[Mutation]:
    """One strategy of several, each as likely as its weight says; `one_of` counts what is in them."""
    lot = [strategy for weight, strategy in choices for _ in range(weight)]
    return st.integers(0, len(lot) - 1).flatmap(lot.__getitem__)


def write(path: Path, content: bytes) -> None:
    """Another content, in a file of its own: the one at ``path`` has other names."""
    path.unlink()
    path.write_bytes(content)


def apply_all(directory: Path, mutations: list[Mutation], *, seal: bool) -> Effect:
    """Apply mutations in order, and tell what may come of them.

    ``seal`` renews the SHA-256 that sqap's own directory keeps of its files, which would hide other checks.
    """
    done = []
    for mutation in mutations:
        path = directory / mutation.file
        before = _read(path)
        if before is None:  # an earlier fault took it away
            continue
        mutation.apply(path)
        if _read(path) != before:
            done.append(mutation)
    effects = [mutation.effect for mutation in done]
    if (directory / MANIFEST).is_file():
        if seal:
            _seal(directory)
        else:
            believed = MANIFEST, *BESIDE
            effects = [m.effect if m.file in believed else Effect.REFUSED for m in done]
    # A second fault of the same file may undo the first.
    alone = len({mutation.file for mutation in done}) == len(done)
    if Effect.REFUSED in effects and alone:
        return Effect.REFUSED
    return Effect.EQUAL if set(effects) <= {Effect.EQUAL} else Effect.CHANGED


def _read(path: Path) -> bytes | None:
    """The content of a file; None if there is none that can be read."""
    try:
        return path.read_bytes() if path.is_file() else None
    except PermissionError:
        return None


def _seal(directory: Path) -> None:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        hashes = manifest["sha256"]
        for name in [name for name in hashes if (directory / name).is_file()]:
            hashes[name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return  # there is nothing to put them in, or nothing to hash
    write(path, json.dumps(manifest).encode())


Need = Literal["must be there", "is read where it is there", "is not read"]


def file_mutations(file: str, need: Need) -> st.SearchStrategy[Mutation]:
    """Faults of a file as such, which a directory needs so much."""
    is_read = need != "is not read"
    damaged = Effect.REFUSED if is_read else Effect.EQUAL
    missing = Effect.CHANGED if need == "is read where it is there" else damaged
    flipped = Effect.CHANGED if is_read else Effect.EQUAL
    is_json = file.endswith(".json")

    def make(
        what: str, apply: Callable[[Path], None], effect: Effect = Effect.REFUSED
    ) -> st.SearchStrategy[Mutation]:
        return st.just(Mutation(file, what, effect if is_read else Effect.EQUAL, apply))

    def cut(share: float) -> Mutation:
        def truncate(path: Path) -> None:
            content = path.read_bytes().rstrip()
            write(path, content[: min(int(len(content) * share), len(content) - 1)])

        return Mutation(file, f"cut off at {share:.3f}", damaged, truncate)

    def flip(place: float, bit: int) -> Mutation:
        def change(path: Path) -> None:
            content = bytearray(path.read_bytes())
            # Half of the places are in the first few hundred bytes, where a file says what it is.
            at = int(place * 1000) if place < 0.5 else int((place - 0.5) * 2 * len(content))
            if content:
                content[at % len(content)] ^= 1 << bit
            write(path, bytes(content))

        return Mutation(file, f"bit {bit} flipped at {place:.4f}", flipped, change)

    strategies = [
        st.floats(0, 1, exclude_max=True).map(cut),
        st.builds(flip, st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
        make("empty", lambda path: write(path, b"")),
        make("missing", lambda path: path.unlink(), missing),
        make("a directory", _make_directory),
        make("a broken link", lambda path: _replace_link(path, "nowhere")),
        make("a link to itself", lambda path: _replace_link(path, path.name)),
        make("a pipe", _make_pipe),
        make("a pointer of Git's", lambda path: write(path, b"version https://git-lfs.github.com/spec/v1\n")),
    ]
    if os.geteuid() != 0:  # root reads everything
        strategies.append(make("unreadable", _make_unreadable))
    if is_json:
        strategies += [
            make("behind a BOM", lambda p: write(p, b"\xef\xbb\xbf" + p.read_bytes()), Effect.EQUAL),
            make("in UTF-16", lambda p: write(p, p.read_bytes().decode(errors="replace").encode("utf-16"))),
            make("not UTF-8", lambda path: write(path, b'{"\xff\xfe": 1, ' + path.read_bytes().lstrip()[1:])),
            make("an array", lambda path: write(path, b"[]")),
            make("empty object", lambda path: write(path, b"{}"), Effect.CHANGED),
            make("deeply nested", lambda path: write(path, b"[" * 200_000 + b"]" * 200_000)),
            make("a number of 5000 digits", lambda path: write(path, b"1" * 5000)),
        ]
    return st.one_of(strategies)


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def _make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _make_unreadable(path: Path) -> None:
    shutil.copyfile(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").rename(path)
    path.chmod(0)
