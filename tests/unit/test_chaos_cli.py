"""`expertmesh chaos` before it starts anything, and the picture of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from expertmesh.chaos.picture import draw_run
from expertmesh.chaos.script import shipped
from expertmesh.cli import main


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["expertmesh", "chaos", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_every_script_of_ours_is_listed_with_what_it_does(monkeypatch, capsys) -> None:
    code, out, _ = command(monkeypatch, capsys, "list")
    assert code == 0
    assert all(f"{name}: " in out for name in shipped())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "nothing.yaml: "),
        ("name: [", "mine.yaml: while parsing"),
        ("- kill", "mine.yaml: a script has keys: name, about, seed"),
        ("name: mine\nmesh: {}\nsteps: [{fault: kill}]", "steps.0: unknown key 'fault'; did you mean 'faults'?"),
    ],
)
def test_a_script_that_cannot_be_read_is_one_line(monkeypatch, capsys, tmp_path: Path, text, message) -> None:
    path = tmp_path / ("nothing.yaml" if text is None else "mine.yaml")
    if text is not None:
        path.write_text(text)
    code, out, err = command(monkeypatch, capsys, "run", str(path))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


def test_a_run_is_drawn_with_its_faults(tmp_path: Path) -> None:
    tokens = {"usual": 60.0, "every_s": 1.0, "from_s": -3.0, "timeline": [60.0, 61.0, 59.0, 20.0, 58.0]}
    strikes = [{"at_s": 0.2, "kinds": ["kill"]}, {"at_s": 1.0, "kinds": ["drop_reply", "slow"]}]
    report = {
        "chaos": "mine",
        "requests": 40,
        "failed": 1,
        "stall_s": {"max": 0.25},
        "faults": {"kill": 1, "drop_reply+slow": 1},
        "tokens_per_second": tokens,
        "strikes": strikes,
    }
    draw_run(report, tmp_path / "run.svg")
    drawn = (tmp_path / "run.svg").read_text()
    for text in ("mine: 40 requests, 1 failed; longest stall 0.25 s", "drop_reply+slow", "tokens per second"):
        assert f"<!-- {text}" in drawn
