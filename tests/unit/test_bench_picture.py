"""Pictures of reports: drawn from the figures, to a file that a browser shows."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from expertmesh.bench.picture import draw_balance, draw_shift
from expertmesh.errors import ConfigError

BALANCE = {
    "cases": [
        {"case": f"{experts} experts, 8 hosts", "mean": {"none": 2.0, "ours": 1.25, "bound of any split": 1.0}}
        for experts in (64, 256)
    ]
}


def test_a_balance_report_is_drawn_with_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "balance.svg"
    draw_balance(BALANCE, path)
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    comments = path.read_text()
    assert all(f"<!-- {text} -->" in comments for text in ("ours", "1.25", "64 experts"))


def test_a_shift_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "shift.png"
    draw_shift({"shift": {"timeline": [{"at_s": 0.5, "imbalance": 1.4}, {"at_s": 1.0, "imbalance": 1.1}]}}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["no/such/folder.svg", "picture.what"])
def test_a_file_that_cannot_be_drawn_is_one_clear_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^picture: "):
        draw_balance(BALANCE, tmp_path / name)
