"""Rules for the whole suite: order, markers that need something, skips that CI refuses, coverage floors."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator

import hypothesis
import pytest

from tests.support.beside import Beside
from tests.support.coverage_floors import measure_and_check
from tests.support.ranks import close_pools
from tests.support.sampling import FULL, tree_seed

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LAYERS = ("dist", "golden", "jobs", "e2e")  # after the unmarked tests, in this order


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "gpu": (has_gpu, "no CUDA device"),
    "ray": (lambda: importlib.util.find_spec("ray") is not None, "ray is not installed"),
    "slurm": (lambda: shutil.which("sbatch") is not None, "sbatch is not on the PATH"),
}

_skips: list[str] = []  # under CI, those that it refuses
_coverage_lines: list[str] = []
_beside: list[Beside] = []  # at most one


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("solomonov")
    group.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")
    group.addoption("--require", default="", help="comma-separated markers whose skip is a failure: ray,slurm,gpu")
    group.addoption("--coverage-floors", action="store_true", help="fail below tests/support/coverage_floors.py")
    group.addoption(
        "--beside", default="", metavar="MARKER", help="run the tests of a marker in a second pytest, meanwhile"
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    if (marker := config.getoption("--beside")) and not config.option.collectonly:
        _beside.append(Beside(marker, list(config.invocation_params.args), str(config.invocation_params.dir)))


def required(config: pytest.Config) -> set[str]:
    names = {name for name in config.getoption("--require").split(",") if name}
    if unknown := names - NEEDS.keys():
        raise pytest.UsageError(f"--require: unknown {sorted(unknown)}, known: {sorted(NEEDS)}")
    return names


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    required(config)
    # Another sample for each state of the tree, the same one when it is run again.
    if config.getoption("hypothesis_seed") is None:
        config.option.hypothesis_seed = str(tree_seed())
    # No deadlines and no speed checks: a crowded machine is no reason to fail.
    hypothesis.settings.register_profile(
        "solomonov",
        deadline=None,
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("solomonov")


def pytest_report_header(config: pytest.Config) -> list[str]:
    ci = os.environ.get("CI", "")
    return [
        f"sampling seed: {tree_seed()}" + (" (all cases: SOLOMONOV_FULL)" if FULL else ""),
        f"strict: skips fail under CI (CI={ci!r}), required: {sorted(required(config))}",
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Unmarked tests first; then the layers; within `dist` by world, so that few pools live at a time."""

    def key(item: pytest.Item) -> tuple[int, int]:
        layer = max((LAYERS.index(name) + 1 for name in LAYERS if item.get_closest_marker(name)), default=0)
        mark = item.get_closest_marker("dist")
        return layer, mark.kwargs.get("world", 0) if mark else 0

    items.sort(key=key)
    if _beside:
        theirs = [item for item in items if item.get_closest_marker(_beside[0].marker)]
        items[:] = [item for item in items if item not in theirs]
        config.hook.pytest_deselected(items=theirs)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, (available, reason) in NEEDS.items():
        if item.get_closest_marker(name) and not available():
            if name in required(item.config):
                pytest.fail(f"--require={name}: {reason}", pytrace=False)
            pytest.skip(reason)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and "gpu" not in report.keywords:
        _skips.append(f"{report.nodeid}: {report.longrepr[2] if isinstance(report.longrepr, tuple) else ''}")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _skips.append(f"{report.nodeid}: {report.longrepr[2] if isinstance(report.longrepr, tuple) else ''}")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    close_pools()
    if _beside and not _beside[0].wait() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if _skips and os.environ.get("CI") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if session.config.getoption("--coverage-floors"):
        lines, held = measure_and_check()
        _coverage_lines.extend(lines)
        if not held and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for other in _beside:
        terminalreporter.section(f"the tests of {other.marker}, which ran beside")
        terminalreporter.write_line(other.output)
    if _coverage_lines:
        terminalreporter.section("coverage of lines and branches")
        for line in _coverage_lines:
            terminalreporter.write_line(line)
    if _skips and os.environ.get("CI"):
        terminalreporter.section("skips that CI refuses", red=True)
        for line in _skips:
            terminalreporter.write_line(line)


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether the golden files are to be written instead of compared."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(autouse=True)
def _same_folder() -> Iterator[None]:
    """A test that changes the working folder does not take the others with it."""
    folder = os.getcwd()
    yield
    os.chdir(folder)
