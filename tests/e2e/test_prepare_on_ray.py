"""prepare on a real Ray of several nodes: its bytes against the local ones; kills, a lost node, Ctrl-C, errors."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_pipeline.build import prepare
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DataConfigurationError
from tests.support import corpus
from tests.support.processes import Program, program_environment, run_program
from tests.support.ray_cluster import RayCluster
from tests.support.sampling import sampler

pytestmark = [pytest.mark.ray, pytest.mark.e2e]

TASK = "_execute_on_node"

PREPARE = """
import sys
from pathlib import Path
from data_pipeline.build import prepare
from data_pipeline.errors import DataError
from tests.e2e.test_prepare_on_ray import settings
from tests.support import corpus

if __name__ == "__main__":
    backend, workers, address = sys.argv[2:]
    try:
        report = prepare(settings(backend, int(workers)), corpus.TOKENIZER, base_folder=Path(sys.argv[1]),
                         show_progress=False, cluster=address)
        print("redone", report.redone)
    except DataError as error:
        print(type(error).__name__, error)
        raise SystemExit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted")
        raise SystemExit(130)
"""

TASKS = """
import sys
from pathlib import Path
import psutil
from data_pipeline import cluster, tasks
from data_pipeline.errors import DataError
from data_pipeline.progress import Progress
from data_pipeline.tasks import Runner, Task
from tests.data_pipeline.test_tasks import fail, hang, note

def run(name, function, /, **arguments):
    with Progress(show=False) as progress, Runner(folder, 2, progress, address) as runner:
        return runner.run(name, [Task(f"{name}-{n}", function, arguments) for n in range(2)])

def pids():
    return [int(path.name.removeprefix("worker-")) for path in folder.glob("worker-*")]

def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # which its raylet did not reap yet
    except psutil.NoSuchProcess:
        return False

def leave():
    # Ray ends a driver's tasks some time after it left: they are to be gone before.
    print("still there:", [pid for pid in pids() if alive(pid)])
    really_leave()

really_leave, cluster.leave = cluster.leave, leave

if __name__ == "__main__":
    folder, address, what = Path(sys.argv[1]), *sys.argv[2:]
    try:
        if what == "hang":
            run("hanging", hang, folder=folder)
        elif what == "unseen":
            tasks.write_bytes = lambda *_: None
            run("notes", note, folder=folder, name="note", text="text")
        else:
            run("failing", fail, kind=what)
    except (DataError, OSError, ZeroDivisionError) as error:
        print([kind.__name__ for kind in type(error).__mro__], error)
        raise SystemExit(1)
    except KeyboardInterrupt:
        print("interrupted")
        raise SystemExit(130)
"""


def settings(backend: str, workers: int) -> DataConfig:
    """Several tasks of each kind that there can be several of."""
    own = SourceConfig(name="own", path="text/**/*.txt", documents="blank_line")
    prepare = {"backend": backend, "workers": workers, "shard_bytes": 512 << 10, "tokenizer_sample_bytes": 64 << 10}
    return corpus.data_config(sources=[own], prepare=prepare)


def command(base: Path, backend: str, ray: RayCluster | None, workers: int = 2) -> dict[str, Any]:
    """`prepare` as a program."""
    script = base / "prepare.py"
    script.write_text(PREPARE)
    address, extra = (ray.address, ray.environment) if ray is not None else ("", {})
    return {
        "argv": [sys.executable, script, base, backend, str(workers), address],
        "log": base / "log",
        "env": program_environment(**extra),
    }


def ended(program: dict[str, Any]) -> tuple[int, str]:
    """Exit code and output of one run of a program."""
    program["log"].unlink(missing_ok=True)
    return run_program(**program, deadline=240)


def tasks_done(base: Path) -> int:
    return len(list((base / "dataset" / ".work" / "done").glob("*.json")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Texts and their dataset, prepared by one process; and the number of its tasks. Read only."""
    base = tmp_path_factory.mktemp("whole")
    for number in range(6):
        path = base / "text" / f"part{number % 2}" / f"file{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(corpus.text(number, lines=16_000))
    report = prepare(settings("local", 1), corpus.TOKENIZER, base_folder=base, show_progress=False)
    names = [path.name for path in (base / "dataset" / "shards").iterdir()]
    assert len(names) > 20
    return base, report.redone


@pytest.fixture
def base(whole: tuple[Path, int], tmp_path: Path) -> Path:
    """A copy of the texts, with no dataset."""
    shutil.copytree(whole[0] / "text", tmp_path / "text", copy_function=shutil.copy2)
    return tmp_path


def assert_whole(base: Path, whole: tuple[Path, int]) -> None:
    assert corpus.contents(base / "dataset") == corpus.contents(whole[0] / "dataset")


@pytest.mark.measured
def test_the_bytes_are_those_of_this_machine_and_a_second_run_needs_no_ray(
    base: Path, whole: tuple[Path, int], ray_cluster: RayCluster
) -> None:
    assert ended(command(base, "local", None)) == (0, f"redone {whole[1]}\n")
    assert_whole(base, whole)
    shutil.rmtree(base / "dataset")
    assert ended(command(base, "ray", ray_cluster)) == (0, f"redone {whole[1]}\n")
    assert_whole(base, whole)
    # Nobody listens there, and this process must not become a driver.
    again = prepare(settings("ray", 2), corpus.TOKENIZER, base_folder=base, show_progress=False, cluster="127.0.0.1:1")
    assert again.redone == 0
    (base / "dataset" / "rows" / "own-train-T32-best_fit.npy").unlink()
    assert ended(command(base, "ray", ray_cluster, workers=1)) == (0, "redone 1\n")
    assert_whole(base, whole)


@pytest.mark.sampled(2, group="preparation on Ray")
@pytest.mark.spare
def test_a_killed_driver_costs_its_unfinished_tasks(
    base: Path, whole: tuple[Path, int], ray_cluster: RayCluster
) -> None:
    # Not among the last tasks: it might end before it is killed.
    moment = sampler("prepare on ray: kill the driver").randrange(1, whole[1] - 8)
    run = command(base, "ray", ray_cluster)
    with Program(**run) as driver:
        driver.wait_for(lambda: tasks_done(base) >= moment, deadline=240, what=f"{moment} tasks are done")
        driver.kill()
    kept = tasks_done(base)
    assert ended(run) == (0, f"redone {whole[1] - kept}\n"), f"killed after {moment}"
    assert_whole(base, whole)


@pytest.mark.sampled(2, group="preparation on Ray")
@pytest.mark.spare
def test_a_lost_node_costs_nothing_but_time(base: Path, whole: tuple[Path, int]) -> None:
    with RayCluster(cpus=(1, 1), first_host="127.0.0.5") as ray, Program(**command(base, "ray", ray)) as driver:
        driver.wait_for(
            lambda: (base / "dataset/.work/done/tokenizer.json").exists() and ray.working(TASK, 0),
            deadline=240,
            what="the node tokenises",
        )
        ray.kill_node(0)
        assert driver.wait(deadline=240) == 0, driver.output()
        # Ray says by itself which node it lost.
        assert driver.output().endswith(f"redone {whole[1]}\n")
        assert "Traceback" not in driver.output()
    assert_whole(base, whole)


def test_a_bad_input_is_the_same_one_message(base: Path, ray_cluster: RayCluster) -> None:
    path = base / "text" / "part1" / "file3.txt"
    path.write_bytes(path.read_bytes()[:5000] + b"\xff" + path.read_bytes()[5000:])
    local, on_ray = ended(command(base, "local", None)), ended(command(base, "ray", ray_cluster))
    assert local[0] == 78
    assert "DataConfigurationError" in local[1]
    assert str(path) in local[1]
    assert on_ray == local


@pytest.mark.sampled(2, group="preparation on Ray")
@pytest.mark.spare
def test_ctrl_c_leaves_no_task_behind_and_a_rerun_finishes(
    base: Path, whole: tuple[Path, int], ray_cluster: RayCluster
) -> None:
    run = command(base, "ray", ray_cluster)
    with Program(**run) as driver:
        driver.wait_for(lambda: tasks_done(base) >= 2 and ray_cluster.working(TASK), deadline=240, what="a task runs")
        driver.send(signal.SIGINT)
        assert (driver.wait(deadline=60), driver.output()) == (130, "interrupted\n")
        kept = tasks_done(base)
        assert not ray_cluster.working(TASK)
        files = corpus.contents(base / "dataset")
    assert 2 <= kept < whole[1]
    assert corpus.contents(base / "dataset") == files
    assert ended(run) == (0, f"redone {whole[1] - kept}\n")
    assert_whole(base, whole)


def tasks_command(folder: Path, ray: RayCluster | None, what: str) -> dict[str, Any]:
    """TASKS as a program."""
    script = folder / "tasks.py"
    script.write_text(TASKS)
    address, extra = (ray.address, ray.environment) if ray is not None else ("127.0.0.1:1", {})
    return {
        "argv": [sys.executable, script, folder, address, what],
        "log": folder / "log",
        "env": program_environment(**extra),
    }


@pytest.mark.sampled(2, group="preparation on Ray")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.spare
def test_busy_tasks_end_with_their_driver(tmp_path: Path, ray_cluster: RayCluster, number: int) -> None:
    with Program(**tasks_command(tmp_path, ray_cluster, "hang")) as driver:
        driver.wait_for(lambda: len(list(tmp_path.glob("worker-*"))) == 2, deadline=120, what="two tasks run")
        workers = [psutil.Process(int(path.name.removeprefix("worker-"))) for path in tmp_path.glob("worker-*")]
        driver.send(number)
        if number == signal.SIGINT:
            assert (driver.wait(deadline=60), driver.output()) == (130, "still there: []\ninterrupted\n")
        else:
            driver.wait(deadline=60)
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("configuration", "DataConfigurationError", "wrong\n  got:    g\n  rule:   r\n  remedy: m"),
        ("damage", "DamagedDataError", "damaged\n  got:    g\n  rule:   r\n  remedy: m"),
        ("bug", "ZeroDivisionError", "a bug"),
        ("exit", "DataError", "died on the cluster four times"),
        ("os", "DataConfigurationError", f"on {os.uname().nodename}: /nonexistent/file: No such file"),
        ("unseen", "DataConfigurationError", ".work/cluster: no such file"),
    ],
)
@pytest.mark.spare
def test_a_failure_arrives_as_it_was_raised(
    tmp_path: Path, ray_cluster: RayCluster, what: str, kind: str, said: str
) -> None:
    code, output = ended(tasks_command(tmp_path, ray_cluster, what))
    assert code == 1, output
    assert f"'{kind}'" in output
    assert said in output
    assert not list(tmp_path.glob(".work/done/*"))
    assert not (tmp_path / "note").exists()


def test_a_cluster_that_is_not_there_is_one_clear_message(tmp_path: Path) -> None:
    code, output = ended(tasks_command(tmp_path, None, "bug"))
    assert code == 1, output
    assert "cannot be joined" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("address", [None, "auto", "ray://host:1", "host:", ":6379"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, address: str | None) -> None:
    with pytest.raises(DataConfigurationError, match="no Ray cluster") as caught:
        prepare(settings("ray", 2), corpus.TOKENIZER, base_folder=tmp_path, show_progress=False, cluster=address)
    assert "backend: local" in caught.value.remedy
    assert not list(tmp_path.iterdir())
