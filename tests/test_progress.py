"""How far a run is, where no terminal shows it: which lines come, when, and where to. Bars are in `test_cli`."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from conftest import Command, toy_folder
from lexigram import progress
from lexigram.progress import Lines, drawing


class Log:
    """Lines with the seconds at which they came, by a clock that is set by hand."""

    def __init__(self) -> None:
        self.now, self.said = 1000.0, list[tuple[float, str]]()
        self.lines = Lines(lambda line: self.said.append((self.now - 1000, line)), lambda: self.now)

    def run(self, name: str, total: int, seconds: float) -> None:
        """A stage whose steps take so long each."""
        with self.lines.stage(name, total) as step:
            for _ in range(total):
                self.now += seconds
                step()

    @property
    def texts(self) -> list[str]:
        return [line for _, line in self.said]


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.mark.parametrize(("total", "seconds"), [(1, 9.9), (1000, 0.0099), (3, 0.0)])
def test_a_short_stage_says_nothing(total: int, seconds: float, log: Log) -> None:
    log.run("fit", total, seconds)
    assert log.said == []


def test_a_line_says_how_far_a_stage_is_and_how_long_it_will_take(log: Log) -> None:
    with log.lines.steps("fit") as update:
        log.now += 12 * 60
        update(42, 210)
        log.now += 48 * 60
        update(210, 210)
    assert log.texts == ["fit 42 of 210, 12 min, about 48 min left", "fit 210 of 210, 60 min"]


@pytest.mark.parametrize(
    ("total", "seconds", "expected"),
    [
        pytest.param(100, 0.2, [10, 20], id="20 seconds: the first, and the end"),
        pytest.param(100, 2, [10, 70, 130, 190, 200], id="minutes: once a minute"),
        pytest.param(100, 360, [360, *range(3960, 33000, 3600), 36000], id="10 hours: every tenth"),
        pytest.param(3, 3600, [3600, 7200, 10800], id="few steps: with each"),
        pytest.param(1, 3600, [3600], id="one step: the end alone"),
    ],
)
def test_lines_are_rare(total: int, seconds: float, expected: list[float], log: Log) -> None:
    log.run("fit", total, seconds)
    assert [when for when, _ in log.said] == pytest.approx(expected, abs=max(seconds, 1))


def test_what_an_earlier_run_has_done_does_not_count_as_fast(log: Log) -> None:
    with log.lines.stage("compress", 100) as step:
        for _ in range(80):
            step()
        log.now += 15
        step()
    assert log.texts == ["compress 81 of 100, 15 s, about 5 min left", "compress 81 of 100, 15 s"]


def test_a_stage_within_another_has_lines_of_its_own(log: Log) -> None:
    with log.lines.stage("heal", 2) as step:
        log.now += 20
        step()
        log.run("held-out text", 4, 5)
    assert log.texts == [
        "heal 1 of 2, 20 s, about 20 s left",
        "held-out text 2 of 4, 10 s, about 10 s left",
        "held-out text 4 of 4, 20 s",
        "heal 1 of 2, 40 s",
    ]


def test_a_stage_that_fails_leaves_the_last_word_to_its_error(log: Log) -> None:
    def failing() -> None:
        with log.lines.stage("fit", 2) as step:
            log.now += 60
            step()
            raise ValueError("not finite")

    with pytest.raises(ValueError, match="not finite"):
        failing()
    assert log.texts == ["fit 1 of 2, 60 s, about 60 s left"]


def test_lines_stand_in_a_file_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither markup nor breaks, however narrow it is said to be."""
    monkeypatch.setattr(progress, "SHORT", 0.0)
    console = Console(file=io.StringIO(), force_interactive=False, force_terminal=False, width=20)
    with drawing(console) as lines, lines.stage("read [bold]all of the weights[/]", 1) as step:
        step()
    assert console.file.getvalue() == "read [bold]all of the weights[/] 1 of 1, 0 s\n"


def test_commands_keep_lines_away_from_results(
    command: Command, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, text = toy_folder(tmp_path / "toy", "llama"), ("--text", words, "--context", 64, "--windows", 2)
    quiet = command("eval", toy, *text)
    assert (quiet.code, quiet.err) == (0, "")
    monkeypatch.setattr(progress, "SHORT", 0.0)
    told = command("eval", toy, *text)
    assert (told.code, told.out) == (0, quiet.out)
    first, last = told.err.splitlines()
    assert first.startswith("evaluate 1 of 2, ")
    assert last.startswith("evaluate 2 of 2, ")
