"""Windows of a text encoder's length."""

import pytest

from minidiffusion.text.chunks import chunks


@pytest.mark.parametrize("count", [0, 1, 74, 75, 76, 150, 151, 1000])
def test_nothing_is_lost_and_every_window_is_framed(count: int) -> None:
    values = list(range(count))
    rows = chunks(values, -1, -2, -3)
    assert len(rows) == max(1, (count + 74) // 75)
    assert all(len(row) == 77 and row[0] == -1 and row.count(-2) == 1 for row in rows)
    assert [value for row in rows for value in row if value >= 0] == values
    assert all(row[row.index(-2) + 1 :] == [-3] * (76 - row.index(-2)) for row in rows)
    assert all(row[-1] == -2 for row in rows[:-1])


def test_empty_windows_fill_up() -> None:
    assert chunks([7], 1, 2, 0, length=5, count=2) == [[1, 7, 2, 0, 0], [1, 2, 0, 0, 0]]
    assert len(chunks(list(range(10)), 0, 0, 0, length=5, count=2)) == 4


def test_a_window_has_room_for_something() -> None:
    with pytest.raises(ValueError, match="length: must be at least 3, got 2"):
        chunks([], 0, 0, 0, length=2)
