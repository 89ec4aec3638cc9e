"""The fuzzer's changes reach both outcomes, and no third."""

from __future__ import annotations

import random
from collections import Counter

from fuzz_wire import change, frames, outcome

from sqap.serving.settings import Limits


def test_changed_frames_are_acted_on_or_refused():
    chance, originals = random.Random(1), frames()
    assert {outcome(frame, Limits()) for frame in originals} == {"acted on"}
    found = Counter(outcome(change(chance.choice(originals), chance), Limits()) for _ in range(3000))
    assert set(found) == {"acted on", "refused"}
    assert found["acted on"] > 20
