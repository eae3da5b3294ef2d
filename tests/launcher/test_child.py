"""A child process: what reaches it, what is known of its end, and that it dies with its starter."""

from __future__ import annotations

import ast
import os
import select
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.child import Child, ChildCommand, exit_fd_by_thread, start_child
from launcher.errors import LaunchConfigurationError
from tests.support.processes import Program, assert_no_process, processes_with, wait_for

SECONDS = 30.0
ECHO = """
import os, sys
print(ascii([[os.fsencode(word) for word in sys.argv[1:]], os.environb[b"VALUE"], os.getcwdb()]))
"""

# What a process can be given: any text without NUL, bytes that are not UTF-8 included (as lone surrogates).
texts = st.text(
    st.one_of(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]),
        st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF),
        st.sampled_from(" '\"\n\t$`\\;&|*#é\u202e"),
    ),
    max_size=12,
).map(lambda text: os.fsdecode(os.fsencode(text)))
names = texts.map(lambda text: text.replace("/", "_")).filter(lambda text: text not in ("", ".", ".."))


def started(*command: str, log: Path, **environment: str) -> Child:
    """A child with our environment."""
    return start_child(ChildCommand(command=command, environment={**os.environ, **environment}, log_path=log))


def ended(child: Child) -> int:
    """Wait for the end; the code."""
    assert select.select([child.exit_fd], [], [], SECONDS)[0], "the child has not ended"
    code = child.exit_code()
    assert code is not None
    return code


@settings(max_examples=25)
@given(st.lists(texts, max_size=4), texts, names)
def test_arguments_environment_and_paths_arrive_unchanged(words: list[str], value: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base, name)
        folder.mkdir()
        child = start_child(
            ChildCommand(
                command=[sys.executable, "-S", "-c", ECHO, *words],
                environment={**os.environ, "VALUE": value},
                log_path=folder / f"log {name}",
                working_directory=folder,
            )
        )
        assert ended(child) == 0
        child.reap()
        seen = ast.literal_eval((folder / f"log {name}").read_text())
        assert seen == [
            [os.fsencode(word) for word in words],
            os.fsencode(value),
            os.fsencode(folder.resolve()),
        ]


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 78", 78), ("kill -9 $$", -9), ("kill -15 $$", -15)])
def test_the_code_is_told_without_reaping(tmp_path: Path, script: str, code: int) -> None:
    child = started("sh", "-c", script, log=tmp_path / "log")
    assert ended(child) == code
    assert child.exit_code() == code
    assert Path(f"/proc/{child.pid}").exists() or sys.platform != "linux"
    assert not child.killed
    child.reap()
    assert not Path(f"/proc/{child.pid}").exists()


def test_a_running_child_has_no_code(tmp_path: Path) -> None:
    child = started("sleep", "60", log=tmp_path / "log")
    assert child.exit_code() is None
    assert child.seconds() > 0.0
    child.kill()
    assert ended(child) == -signal.SIGKILL
    assert child.killed
    child.reap()


def test_stdout_and_stderr_are_appended_and_stdin_is_empty(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("earlier\n")
    child = started("sh", "-c", "cat; echo out; echo err >&2", log=log)
    assert ended(child) == 0
    child.reap()
    assert log.read_text() == "earlier\nout\nerr\n"


def test_kill_ends_the_whole_group_even_without_its_leader(tmp_path: Path) -> None:
    token = f"leftover-{tmp_path}"
    child = started("sh", "-c", 'sh -c "sleep 600; : $0" "$0" & exit 3', token, log=tmp_path / "log")
    assert ended(child) == 3
    assert processes_with(token), "the helper outlives its leader until the group is killed"
    child.reap()
    assert_no_process(token)


def test_signals_go_to_the_process_alone(tmp_path: Path) -> None:
    helper = '(trap "echo helper" TERM; echo ready; sleep 600) &'
    script = f'trap "echo got; exit 75" TERM; {helper} while :; do wait; done'
    child = started("sh", "-c", script, log=tmp_path / "log")
    wait_for(lambda: "ready" in (tmp_path / "log").read_text(), deadline=SECONDS, what="the helper runs")
    child.send_signal(signal.SIGTERM)
    assert ended(child) == 75
    child.reap()
    assert (tmp_path / "log").read_text() == "ready\ngot\n"


def test_the_leader_of_its_own_group(tmp_path: Path) -> None:
    child = started("sleep", "60", log=tmp_path / "log")
    assert os.getpgid(child.pid) == child.pid != os.getpgid(0)
    child.reap()


def test_the_end_can_be_watched_by_a_thread_too(tmp_path: Path) -> None:
    child = started("sh", "-c", "exit 5", log=tmp_path / "log")
    fd = exit_fd_by_thread(child._process)
    assert select.select([fd], [], [], SECONDS)[0]
    os.close(fd)
    assert child.exit_code() == 5
    child.reap()


def test_a_system_without_pidfd_uses_that_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refused, raising=False)
    child = started("sh", "-c", "kill -11 $$", log=tmp_path / "log")
    assert ended(child) == -11
    child.reap()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux")
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(0)", "sys.exit(0)"])
def test_the_child_dies_with_its_starter_however_that_ends(tmp_path: Path, end: str) -> None:
    token = f"orphan-{tmp_path}"
    script = f"""
import os, sys
from pathlib import Path
from launcher.child import ChildCommand, start_child
deaf = "trap '' TERM HUP INT; echo up; while :; do sleep 0.05; done"
log = Path({str(tmp_path / "log")!r})
start_child(ChildCommand(["sh", "-c", deaf, {token!r}], os.environ, log))
while "up" not in log.read_text():
    pass
{end}
"""
    with Program([sys.executable, "-c", script], log=tmp_path / "starter.log") as program:
        program.wait(deadline=SECONDS)
        assert_no_process(token)
        assert "up" in (tmp_path / "log").read_text(), program.output()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux")
def test_the_child_dies_with_the_thread_that_started_it(tmp_path: Path) -> None:
    children = []
    thread = threading.Thread(target=lambda: children.append(started("sleep", "600", log=tmp_path / "log")))
    thread.start()
    thread.join()
    assert ended(children[0]) == -signal.SIGKILL
    children[0].reap()


@pytest.mark.parametrize("command", ["/no/such/program", "no-such-program-anywhere", "/etc"])
def test_a_program_that_cannot_be_started_is_a_configuration_error(tmp_path: Path, command: str) -> None:
    with pytest.raises(LaunchConfigurationError, match="cannot be started") as caught:
        started(command, log=tmp_path / "log")
    assert command in str(caught.value)
    assert caught.value.exit_code == 78


def test_a_missing_working_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchConfigurationError, match="gone"):
        start_child(ChildCommand(["true"], os.environ, tmp_path / "log", working_directory=tmp_path / "gone"))


def test_a_log_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(LaunchConfigurationError, match="logs cannot be written"):
        started("true", log=tmp_path / "missing" / "log")
