"""The server under load: what is computed of its rows, and that a file is gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from serve_load import batching, growth, kept


def row(name: str, robots: int, rate: float) -> dict[str, object]:
    return {"candidate": {"name": name}, "robots": robots, "answers_per_second": rate}


def test_batches_are_compared_with_one_at_a_time_at_the_same_number_of_robots():
    rows = [
        row("batch=1", 4, 20.0),
        row("batch=16", 4, 25.0),
        row("batch=16", 16, 30.0),
        row("null", 4, 900.0),
    ]
    assert batching(rows) == {4: 1.25}


def test_growth_is_of_the_quarters_and_not_of_one_sample():
    assert growth([100] * 20 + [500] + [100] * 19) == 0
    assert growth(list(range(0, 4000, 100))) == 3000
    assert growth([7]) == 0


def test_rows_of_another_build_are_not_gone_on_with(tmp_path: Path):
    path, about = tmp_path / "load.json", {"build": {"sqap": "1"}, "settings": {"seconds": 1.0}}
    assert kept(None, about) == kept(path, about) == {"rows": [], "connects": None}
    path.write_text(json.dumps(about | {"rows": [row("null", 1, 9.0)], "connects": None}), encoding="utf-8")
    assert [found["robots"] for found in kept(path, about)["rows"]] == [1]
    with pytest.raises(SystemExit, match="name another file"):
        kept(path, about | {"settings": {"seconds": 2.0}})
