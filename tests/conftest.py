"""Rules for the whole suite: order, markers that need something, skips that CI refuses, coverage floors."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator

import hypothesis
import pytest

from tests.support import measuring
from tests.support.coverage_floors import measure_and_check
from tests.support.ranks import close_pools
from tests.support.sampling import FULL, sample, sampler, tree_seed

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LAYERS = ("dist", "golden", "e2e")  # after the unmarked tests, in this order


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
_seconds: dict[str, float] = {}  # by test file
SLOWEST_FILES = 25
_left_out: list[str] = []  # for time
_begun = time.monotonic()
SPARE_SECONDS = 2000  # with the installation before, and the last of them, some 40 minutes


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("solomonov")
    group.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")
    group.addoption("--require", default="", help="comma-separated markers whose skip is a failure: ray,slurm,gpu")
    group.addoption("--coverage-floors", action="store_true", help="fail below tests/support/coverage_floors.py")
    group.addoption(
        "--sampled",
        action="store_true",
        help="a few of the tests marked so, drawn by the tree; SOLOMONOV_FULL=1: all",
    )
    group.addoption(
        "--spare-seconds",
        type=float,
        default=SPARE_SECONDS,
        help="under --sampled: since the start, when no test that is marked spare begins any more",
    )


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
    """Unmarked tests first; then the layers; within `dist` by world, so that few pools live at a time.

    Under --sampled the spare ones come last, file by file in an order that the tree draws.
    """
    sampled = config.getoption("--sampled")
    files = sorted({str(item.path) for item in items})
    place = {name: number for number, name in enumerate(sampler("spare").sample(files, len(files)))}

    def key(item: pytest.Item) -> tuple[int, int, int]:
        layer = max((LAYERS.index(name) + 1 for name in LAYERS if item.get_closest_marker(name)), default=0)
        mark = item.get_closest_marker("dist")
        spare = sampled and item.get_closest_marker("spare") is not None
        return len(LAYERS) + 1 if spare else layer, place[str(item.path)] if spare else 0, world(mark)

    items.sort(key=key)
    if sampled:
        dropped = {id(item): item for item in not_drawn(items)}
        items[:] = [item for item in items if id(item) not in dropped]
        config.hook.pytest_deselected(items=list(dropped.values()))


def world(mark: pytest.Mark | None) -> int:
    """How many ranks a `dist` mark says that its test starts, 0 where it does not say."""
    return int(mark.kwargs.get("world", 0)) if mark else 0


def not_drawn(items: list[pytest.Item]) -> list[pytest.Item]:
    """Those that a run leaves out: `sampled(count)` keeps so many of a function's cases, or of a group's tests."""
    groups: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        if (mark := item.get_closest_marker("sampled")) is not None:
            group = mark.kwargs.get("group", item.nodeid.partition("[")[0])
            groups.setdefault((group, mark.args[0]), []).append(item)
    kept = {id(item) for (group, count), cases in groups.items() for item in sample(cases, count, f"tests: {group}")}
    return [item for cases in groups.values() for item in cases if id(item) not in kept]


@pytest.hookimpl(tryfirst=True, specname="pytest_runtest_protocol")
def pytest_leave_out_what_there_is_no_time_for(item: pytest.Item) -> bool | None:
    """A spare test does not begin late: of a slow machine's run a part is left out, and told."""
    if not item.config.getoption("--sampled") or FULL or item.get_closest_marker("spare") is None:
        return None
    if time.monotonic() - _begun < item.config.getoption("--spare-seconds"):
        return None
    _left_out.append(item.nodeid)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    whole = item.get_closest_marker("measured") is not None
    ends = item.get_closest_marker("e2e") is not None
    with contextlib.nullcontext() if whole else measuring.not_at_all() if ends else measuring.briefly():
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, (available, reason) in NEEDS.items():
        if item.get_closest_marker(name) and not available():
            if name in required(item.config):
                pytest.fail(f"--require={name}: {reason}", pytrace=False)
            pytest.skip(reason)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.partition("::")[0]
    _seconds[name] = _seconds.get(name, 0.0) + report.duration
    if report.skipped and not hasattr(report, "wasxfail") and "gpu" not in report.keywords:
        _skips.append(f"{report.nodeid}: {report.longrepr[2] if isinstance(report.longrepr, tuple) else ''}")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _skips.append(f"{report.nodeid}: {report.longrepr[2] if isinstance(report.longrepr, tuple) else ''}")


@pytest.hookimpl(trylast=True)  # after the last fixtures have gone, whose processes are measured
def pytest_sessionfinish(session: pytest.Session) -> None:
    close_pools()
    if _skips and os.environ.get("CI") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if session.config.getoption("--coverage-floors"):
        lines, held = measure_and_check()
        _coverage_lines.extend(lines)
        if not held and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("--sampled"):
        terminalreporter.section(f"the {SLOWEST_FILES} slowest files")
        for name, seconds in sorted(_seconds.items(), key=lambda item: -item[1])[:SLOWEST_FILES]:
            terminalreporter.write_line(f"{seconds:7.0f}s {name}")
    if _left_out:
        terminalreporter.section(f"left out for time: {len(_left_out)} (SOLOMONOV_FULL=1 runs all)")
        for name, count in sorted(collections.Counter(name.partition("[")[0] for name in _left_out).items()):
            terminalreporter.write_line(f"{count:7} {name}")
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
