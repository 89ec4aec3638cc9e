"""A million frames that are no frames: python benchmarks/fuzz_wire.py --count 1000000

Frames of real observations are changed at random: bytes set, cut, inserted, doubled, lengths and types among
them. Each must be decoded, or be refused in one sentence (`InputError`), by the decoder and by the reader of
requests behind it; a frame that leads to anything else is printed. Memory is printed as it grows.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter

import numpy as np

from sqap.errors import InputError
from sqap.observation import Camera, Observation
from sqap.process import peak_rss_bytes
from sqap.serving.requests import read_request, write_request
from sqap.serving.settings import Limits
from sqap.serving.wire import pack, unpack

# First bytes of MessagePack's types, and ends of what its lengths can be.
TELLING = (*range(0xC0, 0xE0), 0x80, 0x81, 0x8F, 0x90, 0x91, 0x9F, 0xA0, 0xBF, 0x00, 0x7F, 0xFF)


def frames() -> list[bytes]:
    """Frames of observations, as robots send them."""
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    cameras = {"front": Camera(np.eye(3), np.eye(4))}
    full = Observation({"front": image, "wrist": image}, "open it", np.ones(3), cameras, np.zeros(3))
    plain = Observation({"front": image}, "open it")
    return [
        pack(write_request(full, seed=1, reset=True, deadline_s=0.1)),
        pack(write_request(plain)),
        pack({"observation/image": image, "observation/state": np.float32([1, 2]), "prompt": "go"}),
    ]


def change(frame: bytes, chance: random.Random) -> bytes:
    """One to six changes."""
    changed = bytearray(frame)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(5)
        if kind == 0:
            changed[at : at + 1] = bytes([chance.choice(TELLING)])
        elif kind == 1:
            changed[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 2:
            del changed[at : at + chance.randint(1, 32)]
        elif kind == 3:
            changed[at:at] = chance.randbytes(chance.randint(1, 16))
        else:
            changed[at:at] = changed[at : at + chance.randint(1, 64)]
    return bytes(changed)


def outcome(frame: bytes, limits: Limits) -> str:
    """``acted on`` or ``refused``; anything else is an exception."""
    try:
        read_request(unpack(frame), limits)
    except InputError:
        return "refused"
    return "acted on"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, limits, originals = random.Random(options.seed), Limits(), frames()
    found: Counter[str] = Counter()
    begin, first = time.monotonic(), peak_rss_bytes()
    for i in range(1, options.count + 1):
        frame = change(chance.choice(originals), chance) if i % 10 else chance.randbytes(chance.randrange(64))
        try:
            found[outcome(frame, limits)] += 1
        except Exception as problem:
            print(f"{type(problem).__name__}: {problem}\n  {frame.hex()}")
            found["failed"] += 1
        if i % 100_000 == 0 or i == options.count:
            grown = (peak_rss_bytes() - first) / 1e6
            print(
                f"{i} frames, {time.monotonic() - begin:.0f} s: {dict(found)}; {grown:.1f} MB more",
                flush=True,
            )
    sys.exit(bool(found["failed"]))


if __name__ == "__main__":
    main()
