"""Events come back in order, whatever several writers and cut lines do to the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from data_pipeline.journal import SCHEMA_VERSION, Journal


def test_events_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.last() is None
    journal.write("one", step=1)
    journal.write("two", text="ü\n")
    journal.write("one", step=2)
    assert [event["event"] for event in journal.events()] == ["one", "two", "one"]
    assert [event["step"] for event in journal.events("one")] == [1, 2]
    last = journal.last("one", "two")
    assert last is not None
    assert last["step"] == 2
    assert last["schema_version"] == SCHEMA_VERSION


def test_a_cut_line_is_closed_off_and_skipped(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("one")
    with journal.path.open("ab") as file:
        file.write(b'{"event": "half')
    journal.write("two")
    assert [event["event"] for event in journal.events()] == ["one", "two"]


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "import sys; from pathlib import Path; from data_pipeline.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for i in range(200): journal.write('e', writer=sys.argv[2], i=i, filler='x' * 300)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 600
    for name in "abc":
        assert [line["i"] for line in lines if line["writer"] == name] == list(range(200))


def test_attempts_count_over_the_life_of_the_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.next_attempt() == 1
    journal.write("attempt_started", attempt=1)
    journal.write("attempt_started", attempt=2)
    assert journal.next_attempt() == 3


def test_a_disk_that_refuses_is_told_not_raised(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "nowhere" / "journal.jsonl")
    assert not journal.try_write("one")
