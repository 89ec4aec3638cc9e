"""A few rows out of a parquet file."""

import pytest

from sqap.errors import InputError
from sqap.frames.parquet import column_names, read_rows

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
ROWS = 1000


@pytest.fixture
def path(tmp_path):
    """Ten row groups; columns with dots and slashes in their names, one the beginning of another's."""
    table = pa.table(
        {
            "index": range(ROWS),
            "a": [i * 2 for i in range(ROWS)],
            "a.b": [[i, i] for i in range(ROWS)],
            "a/c": [str(i) for i in range(ROWS)],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=100)
    return tmp_path / "t.parquet"


def test_wanted_rows_come_in_the_order_of_the_file(path):
    rows = read_rows(path, ["a.b", "index", "a/c"], "index", {999, 3, 150})
    assert rows == [{"a.b": [i, i], "index": i, "a/c": str(i)} for i in (3, 150, 999)]


def test_only_the_columns_asked_for_come_back(path):
    assert read_rows(path, ["a"])[:2] == [{"a": 0}, {"a": 2}]
    assert len(read_rows(path, ["a"])) == ROWS
    assert read_rows(path, ["index"], "index", {ROWS}) == []
    assert column_names(path) == ["index", "a", "a.b", "a/c"]


def test_other_row_groups_are_not_read(path):
    """Row group 0 is damaged: reading it fails, reading the others does not."""
    data = bytearray(path.read_bytes())
    group = pq.read_metadata(path).row_group(0)
    data[4 : 4 + group.total_byte_size // 2] = b"\xff" * (group.total_byte_size // 2)
    path.write_bytes(data)
    assert read_rows(path, ["index", "a"], "index", {150, 999}) == [
        {"index": 150, "a": 300},
        {"index": 999, "a": 1998},
    ]
    with pytest.raises(InputError, match=r"cannot read .*t\.parquet"):
        read_rows(path, ["index", "a"], "index", {50})


def test_a_file_without_statistics_is_searched_whole(tmp_path):
    table = pa.table({"index": range(ROWS)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=100, write_statistics=False)
    assert read_rows(tmp_path / "t.parquet", ["index"], "index", {7, 777}) == [{"index": 7}, {"index": 777}]


def test_a_missing_column_is_named(path):
    with pytest.raises(InputError, match=r"t\.parquet has no column 'z'; it has index, a, a\.b, a/c"):
        read_rows(path, ["a", "z"])


def test_what_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(InputError, match=r"cannot read .*t\.parquet, which should be parquet") as caught:
        read_rows(tmp_path / "t.parquet", ["a"])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"none\.parquet is missing"):
        column_names(tmp_path / "none.parquet")
