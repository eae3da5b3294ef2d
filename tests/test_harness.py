"""The suite's own rules, each broken on purpose: pytest's exit code and what it says, and what is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import coverage
import pytest

from tests.support.coverage_floors import FLOORS, shares
from tests.support.processes import Program, assert_no_process, processes_with, run_program, wait_for
from tests.support.source_tree import PACKAGES, ROOT

SUITE = """
import warnings
import pytest

@pytest.mark.{mark}
def test_one() -> None:
    {body}
"""


def run_suite(folder: Path, *, mark: str, body: str, ci: bool, options: tuple[str, ...] = ()) -> tuple[int, str]:
    (folder / "test_small.py").write_text(SUITE.format(mark=mark, body=body), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CI": "true" if ci else ""}
    argv = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml")]
    argv += ["--rootdir", str(folder), "-p", "no:cacheprovider", *options, str(folder / "test_small.py")]
    return run_program(argv, log=folder / "log.txt", deadline=120, cwd=folder, env=environment)


def test_a_skip_fails_under_ci_and_only_there(tmp_path: Path) -> None:
    code, output = run_suite(tmp_path, mark="golden", body="pytest.skip('no reason')", ci=False)
    assert code == 0, output
    code, output = run_suite(tmp_path, mark="golden", body="pytest.skip('no reason')", ci=True)
    assert code == 1, output
    assert "skips that CI refuses" in output, "it says why"
    assert "no reason" in output.split("skips that CI refuses")[1], "and which"
    assert "1 skipped" in output.splitlines()[-1], "the last line is still pytest's own"


def test_a_skip_for_want_of_a_gpu_is_allowed_but_can_be_required(tmp_path: Path) -> None:
    environment_has_none = "__import__('torch').cuda.is_available() or pytest.skip('no CUDA device')"
    code, output = run_suite(tmp_path, mark="gpu", body=environment_has_none, ci=True)
    assert code == 0, output
    code, output = run_suite(tmp_path, mark="ray", body="pass", ci=False, options=("--require=spark",))
    assert code == pytest.ExitCode.USAGE_ERROR, output
    assert "unknown ['spark']" in output, "a misspelt requirement is refused"


def test_a_required_system_that_is_absent_fails(tmp_path: Path) -> None:
    code, output = run_suite(tmp_path, mark="slurm", body="pass", ci=False, options=("--require=slurm",))
    from shutil import which

    assert (code == 0) == (which("sbatch") is not None), output


DRAWN = """
import pytest

@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", range(9))
def test_cases(case: int) -> None: pass

@pytest.mark.sampled(1, group="both")
def test_one() -> None: pass

@pytest.mark.sampled(1, group="both")
def test_other() -> None: pass

def test_always() -> None: pass
"""


@pytest.mark.parametrize(("options", "full", "count"), [(["--sampled"], "", 4), ([], "", 12), (["--sampled"], "1", 12)])
def test_a_part_is_drawn_of_what_is_sampled(options: list[str], full: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "test_parts.py").write_text(DRAWN, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SOLOMONOV_FULL": full}
    argv = [sys.executable, "-m", "pytest", "-v", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml"), *options]
    argv += ["--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path / "test_parts.py")]
    runs = []
    for _ in range(2):
        code, output = run_program(argv, log=tmp_path / "log.txt", deadline=120, cwd=tmp_path, env=environment)
        (tmp_path / "log.txt").unlink()
        assert code == 0, output
        runs.append(re.findall(r"(test_\w+(?:\[\d\])?) PASSED", output))
    assert runs[0] == runs[1], "the same ones again"
    assert len(runs[0]) == count, runs[0]
    assert sum(name.startswith("test_cases") for name in runs[0]) == (2 if count == 4 else 9)
    assert "test_always" in runs[0]
    timed = re.findall(r"^ +\d+s (\S+)$", output, re.MULTILINE)
    assert timed == (["test_parts.py"] if options else []), "where the time of a whole run went, file by file"


SPARE = """
import pytest

@pytest.mark.spare
def test_long() -> None: pass

@pytest.fixture(scope="session")
def kept():
    yield
    print("THE FIXTURE HAS GONE")

@pytest.mark.spare
@pytest.mark.parametrize("case", range(3))
def test_longer(case: int, kept: None) -> None: pass

def test_always(kept: None) -> None: pass

@pytest.mark.e2e
def test_the_end() -> None: pass
"""


@pytest.mark.parametrize(
    ("options", "full", "names"),
    [
        (
            ["--sampled", "--spare-seconds=3600"],
            "",
            ["always", "the_end", "long", "longer[0]", "longer[1]", "longer[2]"],
        ),
        (["--sampled", "--spare-seconds=0"], "", ["always", "the_end"]),
        (["--sampled", "--spare-seconds=0"], "1", ["always", "the_end", "long", "longer[0]", "longer[1]", "longer[2]"]),
        (["--spare-seconds=0"], "", ["long", "longer[0]", "longer[1]", "longer[2]", "always", "the_end"]),
    ],
)
def test_what_may_be_spared_comes_last_and_not_late(
    options: list[str], full: str, names: list[str], tmp_path: Path
) -> None:
    (tmp_path / "test_parts.py").write_text(SPARE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SOLOMONOV_FULL": full}
    argv = [sys.executable, "-m", "pytest", "-v", "-s", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml")]
    argv += ["--rootdir", str(tmp_path), "-p", "no:cacheprovider", *options, str(tmp_path / "test_parts.py")]
    code, output = run_program(argv, log=tmp_path / "log.txt", deadline=120, cwd=tmp_path, env=environment)
    assert code == 0, output
    assert re.findall(r"test_(\w+(?:\[\d\])?) PASSED", output) == names
    assert "THE FIXTURE HAS GONE" in output
    told = "left out for time: 4 (SOLOMONOV_FULL=1 runs all)"
    assert (told in output) == (len(names) == 2), output
    if told in output:
        assert re.search(r"^ +3 test_parts.py::test_longer$", output, re.MULTILINE), (
            "which, and how many of their cases"
        )


WATCHED = """
import subprocess, sys, time
import pytest
import works

def child(name: str) -> None:
    subprocess.run([sys.executable, "-c", f"import works; works.{name}()"], check=True)

def test_long() -> None:
    works.at_once()
    child("child_at_once")
    end = time.process_time() + 1.5
    while time.process_time() < end:
        pass
    works.late()

def test_next() -> None:
    works.in_the_next_test()

@pytest.mark.e2e
def test_end() -> None:
    works.in_an_end_to_end_test()
    child("child_of_an_end_to_end_test")

@pytest.mark.e2e
@pytest.mark.measured
def test_measured() -> None:
    works.in_a_measured_one()
    child("child_of_a_measured_one")
"""
SEEN = ["at_once", "child_at_once", "in_the_next_test", "in_a_measured_one", "child_of_a_measured_one"]
UNSEEN = ["late", "in_an_end_to_end_test", "child_of_an_end_to_end_test"]


def test_coverage_watches_for_as_long_as_it_tells_something(tmp_path: Path) -> None:
    (tmp_path / "test_watched.py").write_text(WATCHED)
    (tmp_path / "works.py").write_text("".join(f"def {name}():\n    return 1\n" for name in SEEN + UNSEEN))
    (tmp_path / ".coveragerc").write_text("[run]\nsource = .\nparallel = true\npatch = subprocess\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    argv = [sys.executable, "-m", "coverage", "run", "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    argv += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), str(tmp_path / "test_watched.py")]
    code, output = run_program(argv, log=tmp_path / "log.txt", deadline=120, cwd=tmp_path, env=environment)
    assert code == 0, output
    joined = coverage.Coverage(config_file=str(tmp_path / ".coveragerc"), data_file=str(tmp_path / "joined"))
    joined.combine([str(path) for path in tmp_path.glob(".coverage.*")])
    ran = set(joined.get_data().lines(str(tmp_path / "works.py")) or ())
    assert [name for number, name in enumerate(SEEN + UNSEEN) if 2 * number + 2 in ran] == SEEN


def test_coverage_is_by_package_over_lines_and_branches() -> None:
    def file(ran: int, of: int) -> dict[str, dict[str, int]]:
        return {"summary": {"covered_lines": ran, "num_statements": of, "covered_branches": 1, "num_branches": 2}}

    report = {"files": {"launcher/a.py": file(7, 8), "solomonov/b.py": file(1, 2), "solomonov/c/d.py": file(2, 2)}}
    assert shares(report) == {"launcher": 80.0, "solomonov": 62.5, "data_pipeline": 0.0}, "sums, not means"
    assert FLOORS.keys() == set(PACKAGES), "each package has its floor"


def test_program_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    token = f"dies-with-its-parent-{os.getpid()}"
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.support.processes import Program\n"
        f"child = Program(['sh', '-c', 'while :; do sleep 1; done', '{token}'], log=Path(sys.argv[1]))\n"
        "print('started', flush=True)\nchild.wait(deadline=600)\n"
    )
    log = tmp_path / "parent.txt"
    with Program([sys.executable, "-c", code, tmp_path / "child.txt"], log=log, cwd=ROOT) as parent:
        parent.wait_for(lambda: "started" in parent.output(), deadline=60, what="the child to start")
        assert any(process.ppid() == parent.pid for process in processes_with(token)), "the child runs"
        with pytest.raises(AssertionError, match="still running"):
            assert_no_process(token, deadline=0)
        os.kill(parent.pid, signal.SIGKILL)
        assert parent.wait(deadline=10) == -signal.SIGKILL, "the parent was killed"
    assert_no_process(token)


def test_leaving_the_with_statement_kills_the_whole_group(tmp_path: Path) -> None:
    token = f"whole-group-{os.getpid()}"
    script = f"sh -c 'while :; do sleep 1; done' {token} & wait"
    with Program(["sh", "-c", script], log=tmp_path / "log.txt"):
        wait_for(lambda: len(processes_with(token)) == 2, deadline=10, what="parent and child to run")
    assert_no_process(token)


def test_processes_of_another_folder_do_not_count(tmp_path: Path) -> None:
    token = f"same-name-{os.getpid()}"
    (tmp_path / "here").mkdir()
    with Program(["sh", "-c", "sleep 60; exit", token], log=tmp_path / "log.txt", cwd=tmp_path / "here") as program:
        program.wait_for(lambda: processes_with(token, tmp_path / "here"), deadline=10, what="it runs")
        assert_no_process(token, tmp_path / "there", deadline=0)
        with pytest.raises(AssertionError, match="still running"):
            assert_no_process(token, tmp_path, deadline=0)


def test_waiting_fails_with_what_it_waited_for_and_what_was_written(tmp_path: Path) -> None:
    expected = pytest.raises(AssertionError, match=r"(?s)a sign: .* ended with 3 before it.*some words")
    with Program(["sh", "-c", "echo some words; exit 3"], log=tmp_path / "log.txt") as program, expected:
        program.wait_for(lambda: False, deadline=60, what="a sign")
    with pytest.raises(TimeoutError, match="the moon: still not so after 0 s"):
        wait_for(lambda: False, deadline=0, what="the moon")


def test_ci_script_and_make_are_well_formed() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK), ".ci/run is executable"
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    argv = ["make", "--dry-run", "TESTS=", "test", "quickstart"]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "coverage run" in line]
    assert line.rstrip().endswith("-m pytest --coverage-floors --sampled"), "make test holds the floors"


@pytest.mark.parametrize(("given", "installed"), [((), ".[ray]"), (("RAY=",), ".")])
def test_the_quickstart_can_be_installed_without_ray(given: tuple[str, ...], installed: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    argv = ["make", "--dry-run", f"VENV={tmp_path / 'new'}", *given, "quickstart"]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if "--editable" in line]
    assert line.split()[-1].strip("'") == installed
