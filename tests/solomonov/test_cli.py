"""The command's words, exit codes and messages; most in this process, the ends of a real training as programs."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import DamagedDataError, DataConfigurationError
from launcher.errors import LaunchConfigurationError
from solomonov import commands, exits, jobs
from solomonov.cli import JOB_VERBS, READER_GONE, build_parser, main
from solomonov.errors import ConfigurationError, DamagedCheckpointError, NumericalError
from solomonov.runfolder import RunFolder
from tests.support.processes import ROOT, assert_no_process, program_environment, run_program
from tests.support.user import User

VERBS = [
    "quickstart",
    "plan",
    "prove",
    "prepare",
    "train",
    "checkpoints",
    "evaluate",
    "generate",
    "export",
    "submit",
    "resume",
    "status",
    "runs",
    "logs",
    "cancel",
    "wait",
    "tensorboard",
    "doctor",
]
INTERNAL = ["supervise", "requeue"]
PARTS = {"got": "a value", "rule": "another", "remedy": "mend it"}


def verb_parsers() -> dict[str, argparse.ArgumentParser]:
    [action] = [item for item in build_parser()._actions if isinstance(item, argparse._SubParsersAction)]
    return dict(action.choices)


# --- words ---------------------------------------------------------------------------------------------------


def test_the_verbs_are_the_documented_ones() -> None:
    assert list(verb_parsers()) == VERBS + INTERNAL
    for name in VERBS:
        if name not in ("quickstart", "train", "tensorboard", "doctor"):
            assert callable(getattr(jobs if name in JOB_VERBS else commands, name)), name


def test_what_is_not_for_typing_is_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    assert "    submit " in listed
    assert not any(f"    {name}" in listed for name in INTERNAL)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "c.yaml"], {"config": "c.yaml", "overrides": []}),
        (["train", "c.yaml", "a.b=1", "c.d=x y"], {"overrides": ["a.b=1", "c.d=x y"]}),
        (["prepare", "c.yaml", "a.b=1", "--json"], {"json": True, "overrides": ["a.b=1"]}),
        (["train", "c.yaml", "a.b=1", "--fresh"], {"fresh": True, "overrides": ["a.b=1"]}),
        (["checkpoints", "list", "own"], {"action": "list", "run": "own", "step": None, "keep_last": None}),
        (["checkpoints", "diff", "own", "--step", "3", "--other", "6"], {"step": 3, "other": 6}),
        (["evaluate", "own"], {"target": "own", "max_bytes": 1 << 20, "data": None, "json": False}),
        (["generate", "own", "--prompt", "x"], {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "seed": 0}),
        (["export", "own", "--dtype", "bfloat16"], {"dtype": "bfloat16", "to": None, "ema": False}),
        (["export", "own", "--ema"], {"ema": True, "step": None}),
        (["tensorboard", "a", "b", "--port", "0"], {"runs": ["a", "b"], "port": 0}),
        (["--debug", "doctor"], {"debug": True, "verb": "doctor"}),
        (["quickstart"], {"folder": "quickstart"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_are_understood(words: list[str], expected: dict[str, object]) -> None:
    found = vars(build_parser().parse_args(words))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    "words",
    [
        ["trian"],
        ["train"],
        ["checkpoints", "own"],
        ["checkpoints", "prune", "own", "--keep-last", "0"],
        ["export", "own", "--dtype", "int8"],
        ["generate", "own", "--seed", "x"],
    ],
    ids=" ".join,
)
def test_wrong_words_end_with_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == exits.USAGE
    assert "usage: solomonov" in capsys.readouterr().err


def test_no_words_show_the_help_and_end_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == exits.USAGE
    output = capsys.readouterr().out
    assert "exit codes:" in output
    assert all(verb in output for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == exits.DONE
    assert f"usage: solomonov {verb}" in capsys.readouterr().out


def test_the_version_is_that_of_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == exits.DONE
    try:
        expected = importlib.metadata.version("solomonov")
    except importlib.metadata.PackageNotFoundError:
        expected = "None"
    assert capsys.readouterr().out.strip() == expected


# --- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ConfigurationError("it is wrong", **PARTS),
        NumericalError("it is not finite", **PARTS),
        DamagedCheckpointError("it is damaged", **PARTS),
        DataConfigurationError("the data is wrong", **PARTS),
        DamagedDataError("the data is damaged", **PARTS),
        LaunchConfigurationError("the launch is wrong", **PARTS),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_one_message_and_its_own_exit_code(
    error: ConfigurationError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(commands, "doctor", fail)
    assert main(["doctor"]) == error.exit_code
    captured = capsys.readouterr()
    assert captured.err == f"error: {error.what}\n  got:    a value\n  rule:   another\n  remedy: mend it\n"
    assert captured.out == ""
    with pytest.raises(type(error)):
        main(["--debug", "doctor"])


def test_a_missing_configuration_is_refused_without_a_traceback(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "solomonov.cli", "train", "nowhere.yaml"]
    code, output = run_program(
        argv, log=tmp_path / "log.txt", deadline=60, cwd=tmp_path, env=program_environment(PYTHONPATH=str(ROOT))
    )
    assert code == exits.CONFIGURATION
    assert output.startswith("error: the configuration file cannot be read")
    assert "Traceback" not in output


def test_a_mistake_in_the_launch_section_is_named(user: User, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "own.yaml", "launch.max_restart=3", "launch.slurm.qos="]) == exits.CONFIGURATION
    error = capsys.readouterr().err
    assert "launch.max_restart: there is no such key; did you mean launch.max_restarts?" in error
    assert not (user.folder / "runs").exists()


def test_more_machines_than_this_one_are_refused(user: User, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "own.yaml", "launch.nodes=2"]) == exits.CONFIGURATION
    assert "submit the run: solomonov submit CONFIG --on slurm" in capsys.readouterr().err
    assert not (user.folder / "runs").exists()


# --- training ------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_training_ends_with_done_and_again_with_nothing_to_do(user: User) -> None:
    words = ("train", "own.yaml", "training.total_steps=2", "schedule.warmup_steps=1", "launch.ranks_per_node=1")
    output = user.must(*words)
    assert "done    step 2/2, loss " in output
    assert "solomonov tensorboard runs/own" in output
    assert "2 updates = 512 tokens" in output
    assert [line["step"] for line in user.metrics()] == [1, 2]
    resolved = json.loads((user.run() / "resolved.json").read_text())
    assert resolved["launch"]["ranks_per_node"] == {"value": 1, "origin": "override"}
    assert resolved["values"]["training.total_steps"] == {"value": 2, "origin": "override"}
    assert resolved["run_id"]
    output = user.must(*words)
    assert "runs/own: done, 2 updates; nothing is left to train" in output
    assert "solomonov export runs/own" in output


@pytest.mark.e2e
def test_an_interrupt_leaves_with_130_and_nothing_running(run: RunFolder) -> None:
    """Ctrl-C in a terminal goes to the whole process group: here while TensorBoard's own server runs."""
    user = User(Path.cwd())
    with user.command("tensorboard", "own", "--port", "0") as program:
        program.wait_for(lambda: "http://" in program.output(), deadline=120, what="the server")
        os.killpg(program.pid, signal.SIGINT)
        assert program.wait(deadline=60) == exits.INTERRUPTED, program.output()
        assert "interrupted" in program.output()
    assert_no_process(str(Path("own:runs/own/tensorboard")))


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_tensorboards_server_ends_with_the_command(number: signal.Signals, run: RunFolder) -> None:
    """At SIGTERM with 0; where coverage is measured its own handler comes first, and ends the process by the signal."""
    user = User(Path.cwd())
    with user.command("tensorboard", "own", "--port", "0") as program:
        address = program.wait_for(
            lambda: re.search(r"http://localhost:(\d+)", program.output()), deadline=120, what="the server"
        )
        with socket.create_connection(("localhost", int(address[1])), timeout=10):
            pass  # it listens
        os.kill(program.pid, number)
        ends = (exits.DONE, -signal.SIGTERM) if number == signal.SIGTERM else (-signal.SIGKILL,)
        assert program.wait(deadline=60) in ends, program.output()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("localhost", int(address[1])), timeout=10).close()


@pytest.mark.e2e
def test_a_port_that_is_taken_is_refused(run: RunFolder) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        code, output = User(Path.cwd()).solomonov("tensorboard", "own", "--port", str(port))
    assert code == exits.CONFIGURATION, output
    assert f"port {port}, it was already in use" in output


@pytest.mark.e2e
@pytest.mark.parametrize("words", [("logs", "own"), ("runs",), ("plan", "own.yaml")])
def test_who_stops_reading_sees_no_traceback(words: tuple[str, ...], run: RunFolder) -> None:
    """As after `| head`: where it is found out at the end all is done."""
    assert unread(*words, PYTHONUNBUFFERED="") == (exits.DONE, "")
    assert unread(*words, PYTHONUNBUFFERED="1") == (READER_GONE, "")


@pytest.mark.e2e
def test_a_complaint_that_nobody_reads_leaves_the_code_as_it_is() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "solomonov.cli", "status", "nowhere"], stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == exits.CONFIGURATION


@pytest.mark.e2e
def test_a_training_goes_on_when_nobody_reads_what_it_prints(user: User) -> None:
    words = ("train", "own.yaml", "training.total_steps=2", "schedule.warmup_steps=1", "launch.ranks_per_node=1")
    assert unread(*words, PYTHONUNBUFFERED="") == (exits.DONE, "")
    assert [line["step"] for line in user.metrics()] == [1, 2]


def unread(*words: str, **environment: str) -> tuple[int, str]:
    """Exit code and errors of a command whose output goes into a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "solomonov.cli", *words],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    os.close(writer)
    return done.returncode, done.stderr
