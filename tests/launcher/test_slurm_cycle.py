"""The end of a cycle of a Slurm job: the decision against a table and its rules, the record against a naive count, and
the requeue as a real program before a Slurm that only notes what it is asked."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.__main__ import write_job
from launcher.config import LaunchConfig
from launcher.job import JobSpec
from launcher.slurm_cycle import (
    NO_PROGRESS,
    Cycle,
    CycleDecision,
    CycleFacts,
    CycleRecord,
    cancel_mark,
    decide,
    requeue,
)
from launcher.slurm_step import Allocation
from tests.support.fake_slurm import calls, fake_commands
from tests.support.processes import Program, program_environment

SECONDS = 60.0
NO_JOB = "4294967000"
VERDICTS = (2, 70, 74, 78)
ALLOCATION = Allocation(job_id=NO_JOB, restart=0, nodes=2, node_list="node[1-2]")


def facts(code: int, **changes: object) -> CycleFacts:
    usual = {"ours": True, "cancelled": False, "ending": False, "preempted": False}
    usual |= {"idle_cycles": 0, "max_no_progress": 3}
    return CycleFacts(code, **{**usual, **changes})  # type: ignore[arg-type]


# --- the decision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_facts", "again", "code", "reason"),
    [
        (facts(75), True, 75, "saved before the time limit"),
        (facts(75, preempted=True), True, 75, "preempted"),
        (facts(75, idle_cycles=2), True, 75, "saved"),
        (facts(75, idle_cycles=3), False, NO_PROGRESS, "3 starts of the job in a row came to no newer checkpoint"),
        (facts(75, idle_cycles=3, preempted=True), False, NO_PROGRESS, "max_no_progress"),
        (facts(75, cancelled=True), False, 75, "cancelled"),
        (facts(75, ours=False), False, 75, "anew"),
        (facts(75, ending=True), False, 75, "Slurm ends the job"),
        (facts(137, ended=False, ending=True), False, 137, "Slurm ends the job"),
        (facts(0), False, 0, "exit code 0"),
        (facts(0, preempted=True), False, 0, "exit code 0"),
        (facts(78), False, 78, "the configuration is wrong"),
        (facts(130), False, 130, "cancelled"),
        (facts(130, suspect="node7", spare_nodes=1), False, 130, "cancelled"),
        (facts(137, ended=False), True, 137, "the supervisor was killed by SIGKILL"),
        (facts(137), False, 137, "exit code 137"),  # its ranks were, again and again
        (facts(137, suspect="node7", spare_nodes=1), True, 137, "every crash began on node7"),
        (facts(134, ended=False), True, 134, "SIGABRT"),
        (facts(139, ended=False), True, 139, "SIGSEGV"),
        (facts(143, ended=False), True, 143, "the supervisor was killed by SIGTERM"),
        (facts(138, ended=False), True, 138, "the supervisor was killed by SIGUSR1"),
        (facts(140, ended=False, preempted=True), True, 140, "the supervisor was killed by SIGUSR2"),
        (facts(143, ended=False, ending=True), False, 143, "Slurm ends the job"),
        (facts(137, stopping=True), True, 137, "asked to save, the ranks ended with exit code 137"),
        (facts(137, preempted=True), True, 137, "asked to save"),
        (facts(1, stopping=True), True, 1, "asked to save"),
        (facts(1, stopping=True, idle_cycles=3), False, 1, "exit code 1"),
        (facts(1, stopping=True, cancelled=True), False, 1, "cancelled"),
        (facts(70, stopping=True), False, 70, "numerical failure"),
        (facts(137, ended=False, idle_cycles=3), False, 137, "exit code 137"),
        (facts(137, ended=False, cancelled=True), False, 137, "cancelled"),
        (facts(143), False, 143, "exit code 143"),
        (facts(1), False, 1, "exit code 1"),
        (facts(1, suspect="node7"), False, 1, "exit code 1"),
        (facts(1, spare_nodes=4), False, 1, "exit code 1"),
        (facts(1, suspect="node7", spare_nodes=1), True, 1, "every crash began on node7"),
        (facts(1, suspect="node7", spare_nodes=1, idle_cycles=3), False, 1, "exit code 1"),
        (facts(1, suspect="node7", spare_nodes=1, cancelled=True), False, 1, "cancelled"),
        (facts(70, suspect="node7", spare_nodes=1), False, 70, "numerical failure"),
    ],
)
def test_what_follows_the_end(given_facts: CycleFacts, again: bool, code: int, reason: str) -> None:
    decision = decide(given_facts)
    assert (decision.requeue, decision.exit_code) == (again, code)
    assert reason in decision.reason
    assert decision.exclude == ("node7" if again and given_facts.suspect is not None else None)


codes = st.one_of(st.sampled_from([0, 1, 75, 128, 130, 134, 137, 139, 143, *VERDICTS]), st.integers(0, 255))


@settings(max_examples=1000)
@given(
    st.builds(
        CycleFacts,
        code=codes,
        ours=st.booleans(),
        cancelled=st.booleans(),
        ending=st.booleans(),
        preempted=st.booleans(),
        idle_cycles=st.integers(0, 6),
        max_no_progress=st.integers(1, 4),
        ended=st.booleans(),
        stopping=st.booleans(),
        suspect=st.none() | st.just("node7"),
        spare_nodes=st.integers(-2, 3),
    )
)
def test_no_facts_break_the_rules(given_facts: CycleFacts) -> None:
    decision = decide(given_facts)
    if decision.requeue:
        assert given_facts.ours
        assert not given_facts.cancelled
        assert not given_facts.ending
        assert given_facts.idle_cycles < given_facts.max_no_progress
        assert given_facts.code not in (0, 130, *VERDICTS)
        assert decision.exit_code == given_facts.code
    if decision.exclude is not None:
        assert decision.requeue
        assert decision.exclude == given_facts.suspect
        assert given_facts.spare_nodes > 0
    assert decision.exit_code == given_facts.code or (decision.exit_code, given_facts.code) == (NO_PROGRESS, 75)
    assert decision.reason


# --- the record ----------------------------------------------------------------------------------------------

records = st.builds(
    CycleRecord,
    starts=st.lists(st.integers(0, 10**12)).map(tuple),
    restart=st.integers(0, 10**6),
    step=st.integers(0, 10**12),
    suspect=st.none() | st.text(),
    excluded=st.lists(st.text()).map(tuple),
    ended=st.booleans(),
    stopping=st.booleans(),
)


@given(records, st.sampled_from(["7", "12_3"]))
def test_a_record_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, made: CycleRecord, job: str
) -> None:
    folder = tmp_path_factory.mktemp("record")
    made.write(folder, job)
    assert CycleRecord.read(folder, job) == made
    assert [path.name for path in folder.iterdir()] == [f"slurm-{job}.json"]


def test_each_job_has_its_own_record(tmp_path: Path) -> None:
    CycleRecord(starts=(1,)).write(tmp_path, "7")
    assert CycleRecord.read(tmp_path, "8") == CycleRecord()
    assert cancel_mark(tmp_path, "7") != cancel_mark(tmp_path, "8")


@given(st.lists(st.integers(0, 6), max_size=8), st.integers(0, 7))
def test_idle_cycles_are_the_last_starts_that_led_nowhere(starts: list[int], step: int) -> None:
    naive = max(n for n in range(len(starts) + 1) if all(start >= step for start in starts[len(starts) - n :]))
    assert CycleRecord(starts=tuple(starts)).idle_cycles(step) == naive


# --- a cycle -------------------------------------------------------------------------------------------------


End = tuple[int | None, str | None, bool]
"""Exit code (None: a signal), machine, killed by us."""


def again(restart: int) -> Allocation:
    return Allocation(job_id=NO_JOB, restart=restart, nodes=2, node_list="node[1-2]")


def attempted(cycle: Cycle, number: int, blamed: int | None, *ends: End) -> None:
    """An attempt whose ranks ended so, in order of rank; the end of one of them explains it."""
    cycle.note("attempt_started", {"attempt": number})
    for rank, (code, host, killed) in enumerate(ends):
        end = {"attempt": number, "rank": rank, "killed_by_launcher": killed, "exit_code": code, "host": host}
        cycle.note("rank_exited", end)
    cycle.note("restart", {"attempt": number + 1, "rank": blamed})


def test_the_start_and_the_end_of_a_cycle_are_noted(tmp_path: Path) -> None:
    first = Cycle(tmp_path, again(0))
    assert first.begin(0, 3) is None
    assert CycleRecord.read(tmp_path, NO_JOB) == CycleRecord(starts=(0,))
    for attempt in (1, 2):
        attempted(first, attempt, 0, (1, "node2", False))
    first.end(40)
    assert CycleRecord.read(tmp_path, NO_JOB) == CycleRecord(starts=(0,), step=40, suspect="node2", ended=True)
    second = Cycle(tmp_path, again(1))
    assert second.begin(40, 3) is None
    found = CycleRecord.read(tmp_path, NO_JOB)
    assert found == CycleRecord(starts=(0, 40), restart=1, step=40), "a new cycle suspects nobody"


def test_a_request_to_leave_is_noted_until_the_next_start(tmp_path: Path) -> None:
    cycle = Cycle(tmp_path, again(0))
    cycle.begin(0, 3)
    cycle.note("stopping", {"signal": "SIGUSR1", "now": False})
    cycle.end(5)
    assert CycleRecord.read(tmp_path, NO_JOB).stopping
    Cycle(tmp_path, again(1)).begin(5, 3)
    assert not CycleRecord.read(tmp_path, NO_JOB).stopping


def test_a_record_that_cannot_be_written_or_read_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cycle = Cycle(tmp_path, again(0))
    cycle.begin(0, 3)
    path = tmp_path / f"slurm-{NO_JOB}.json"
    aside = path.with_suffix(".tmp")
    aside.mkdir()
    cycle.end(5)
    assert "could not be noted" in capsys.readouterr().out
    aside.rmdir()
    path.write_text("")  # as after a crash of the machine
    assert CycleRecord.read(tmp_path, NO_JOB) == CycleRecord()
    assert "the job's earlier starts do not count" in capsys.readouterr().out


def test_starts_that_lead_nowhere_have_a_limit(tmp_path: Path) -> None:
    """Slurm's own requeues do not ask us: the start itself is refused."""
    said = [Cycle(tmp_path, again(restart)).begin(10, 3) for restart in range(5)]
    assert said[:3] == [None, None, None]
    assert said[3] == "Slurm has started the job 3 times without a checkpoint newer than step 10"
    assert said[4] is not None
    assert "4 times" in said[4]
    assert Cycle(tmp_path, again(5)).begin(11, 3) is None, "a newer checkpoint begins the count anew"


def test_nodes_to_avoid_outlive_a_cycle(tmp_path: Path) -> None:
    CycleRecord(starts=(3,), suspect="node1", excluded=("node9",)).write(tmp_path, NO_JOB)
    cycle = Cycle(tmp_path, again(1))
    assert cycle.begin(4, 3) is None
    cycle.end(5)
    assert CycleRecord.read(tmp_path, NO_JOB).excluded == ("node9",)


@pytest.mark.parametrize(
    ("attempts", "suspect"),
    [
        ([], None),
        ([(0, [(1, "node1", False)])], None),  # once is no pattern
        ([(0, [(1, "node1", False)])] * 2, "node1"),
        ([(0, [(None, "node1", False), (1, "node2", False)]), (0, [(None, "node1", False)])], "node1"),  # a signal
        ([(1, [(1, "node1", False), (None, "node2", False)])] * 2, "node2"),  # whose end was known last
        ([(0, [(1, "node1", False)]), (0, [(1, "node2", False)])], None),
        ([(0, [(None, "node1", True)])] * 2, None),  # killed by us
        ([(0, [(75, "node1", False)]), (0, [(0, "node1", False)]), (0, [(78, "node1", False)])], None),  # no crashes
        ([(None, [(75, "node1", False)])] * 2, None),  # another number of ranks
        ([(0, [(1, None, False)])] * 2, None),  # this machine has no name
        ([(0, [(1, None, False)]), (0, [(1, "node1", False)])], None),
    ],
)
def test_the_suspect_is_the_node_of_the_rank_to_blame_in_every_attempt(
    attempts: list[tuple[int | None, list[End]]], suspect: str | None, tmp_path: Path
) -> None:
    cycle = Cycle(tmp_path, again(0))
    cycle.begin(0, 3)
    for number, (blamed, ends) in enumerate(attempts, 1):
        attempted(cycle, number, blamed, *ends)
    cycle.end(0)
    assert CycleRecord.read(tmp_path, NO_JOB).suspect == suspect


def test_the_only_node_is_no_suspect(tmp_path: Path) -> None:
    cycle = Cycle(tmp_path, replace(again(0), nodes=1))
    cycle.begin(0, 3)
    for attempt in (1, 2, 3):
        attempted(cycle, attempt, 0, (1, "node1", False))
    cycle.end(0)
    assert CycleRecord.read(tmp_path, NO_JOB).suspect is None


# --- the requeue ---------------------------------------------------------------------------------------------


@pytest.mark.slurm
@pytest.mark.parametrize("code", [0, 1, *VERDICTS])
def test_an_end_for_good_leaves_with_its_code(code: int, tmp_path: Path) -> None:
    """Asked of the real cluster, which does not know this job."""
    decisions: list[CycleDecision] = []
    assert requeue(tmp_path, code, ALLOCATION, 3, decisions.append) == code
    assert [decision.requeue for decision in decisions] == [False]


class Slurm:
    """A scontrol that knows one job, and ends whoever has it queued again, as Slurm does."""

    def __init__(self, folder: Path, *, restarts: int = 0, state: str = "RUNNING", away: int = 0) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.bin = folder / "bin"
        answer = f"JobState={state} Reason=None\\n   Restarts={restarts} ExitCode=0:0\\n   Partition=main\\n"
        scontrol = f"""
            if [ $(ls {folder} | grep -c away) -lt {away} ]; then
                : > {folder}/away-$$; echo "Unable to contact slurm controller" >&2; exit 1
            fi
            case $1 in
                show) printf 'JobId=7 JobName=own\\n   {answer}' ;;
                requeuehold) kill $PPID ;;
                requeue | release) kill -9 $PPID ;;
            esac
        """
        self.environment = fake_commands(self.bin, scontrol=scontrol, sinfo="echo 'main*|up|infinite|4|(null)|2'")
        write_job(folder, JobSpec(["true"], self.logs), LaunchConfig(max_no_progress=2), Path("rank.sh"))

    def requeue(self, code: int, *, restart: int = 0) -> tuple[int, dict[str, str]]:
        """Run the command; its exit code, and what it said it would do."""
        allocation = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        environment = program_environment(PATH=self.environment["PATH"], **allocation, SLURM_RESTART_COUNT=str(restart))
        command = [sys.executable, "-m", "launcher", "requeue", str(self.folder), str(code)]
        with Program(command, log=self.folder / "requeue.log", env=environment) as program:
            ended = program.wait(deadline=SECONDS)
            return ended, json.loads(program.output().splitlines()[-1])

    def changes(self) -> list[list[str]]:
        """What scontrol was asked to change."""
        return [words for words in calls(self.bin, "scontrol") if words[0] != "show"]


def test_a_saved_job_is_queued_again(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path)
    CycleRecord(starts=(0,), step=5).write(slurm.logs, "7")
    assert slurm.requeue(75) == (-9, {"event": "requeue", "reason": "saved before the time limit"})
    assert slurm.changes() == [["requeue", "7"]]


@pytest.mark.parametrize("ended", [False, True])
def test_a_supervisor_that_was_killed_is_told_from_one_whose_ranks_were(ended: bool, tmp_path: Path) -> None:
    """By the record: both leave with 137, and only the first did not come to note its end."""
    slurm = Slurm(tmp_path)
    CycleRecord(starts=(0,), step=5, ended=ended).write(slurm.logs, "7")
    code, said = slurm.requeue(137)
    assert (code, said["event"]) == ((137, "leave") if ended else (-9, "requeue"))
    assert slurm.changes() == ([] if ended else [["requeue", "7"]])


def test_a_suspect_node_is_avoided_with_those_before_it(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path)
    CycleRecord(starts=(0,), step=5, suspect="node2", excluded=("node1",)).write(slurm.logs, "7")
    code, said = slurm.requeue(1)
    assert (code, said["event"]) == (-9, "requeue")
    changes = [["requeuehold", "7"], ["update", "JobId=7", "ExcNodeList=node1,node2"], ["release", "7"]]
    assert slurm.changes() == changes, "it outlives being asked to end until the job may start again"
    assert CycleRecord.read(slurm.logs, "7").excluded == ("node1", "node2")


def test_no_node_is_avoided_that_the_job_needs(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path)
    CycleRecord(starts=(0,), step=5, suspect="node3", excluded=("node1", "node2")).write(slurm.logs, "7")
    assert slurm.requeue(1)[0] == 1
    assert slurm.changes() == []


@pytest.mark.parametrize("why", ["mark", "state", "anew", "record", "idle"])
def test_a_saved_job_ends_where_it_should_not_go_on(why: str, tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, restarts=1 if why == "anew" else 0, state="CANCELLED" if why == "state" else "RUNNING")
    starts, restart = ((5, 5), 0) if why == "idle" else ((0,), 1 if why == "record" else 0)
    CycleRecord(starts=starts, restart=restart, step=5).write(slurm.logs, "7")
    if why == "mark":
        cancel_mark(slurm.logs, "7").touch()
    code, said = slurm.requeue(75)
    assert (code, said["event"]) == (NO_PROGRESS if why == "idle" else 75, "leave")
    assert slurm.changes() == []


def test_a_controller_that_is_away_for_a_moment_is_asked_again(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, away=1)
    CycleRecord(starts=(0,), step=5).write(slurm.logs, "7")
    code, said = slurm.requeue(75)
    assert (code, said["event"]) == (-9, "requeue")
    assert slurm.changes() == [["requeue", "7"]]
