"""The copied code against the files that it comes from, and against a program that runs from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from solomonov.snapshot import PACKAGES, snapshot
from tests.support.processes import program_environment
from tests.support.source_tree import ROOT

Tree = dict[str, bytes]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small source tree with what belongs to a snapshot and what does not."""
    files = {
        "launcher/__init__.py": "",
        "launcher/py.typed": "",
        "solomonov/model/layers.py": "import launcher\n",
        "solomonov/base.yaml": "a: 1\n",
        "data_pipeline/a.py": "A = 1\n",
        "slurm/train.sbatch": "#!/usr/bin/env bash\n",
        "slurm/rank.sh": '#!/usr/bin/env bash\nexec "$@"\n',
    }
    others = ["launcher/__pycache__/x.pyc", "launcher/notes.txt", "slurm/README.md", "tests/test_a.py", "runs/own/a.py"]
    for name, text in {**files, **dict.fromkeys(others, "other")}.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "source/slurm/rank.sh").chmod(0o755)
    return tmp_path / "source"


def take(source: Path, folder: Path) -> Path:
    return snapshot(source, source / "slurm", folder)


def tree(folder: Path) -> Tree:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_code_and_the_scripts_are_copied_and_nothing_else(source: Path, tmp_path: Path) -> None:
    copy = take(source, tmp_path / "code")
    assert sorted(tree(copy)) == [
        "data_pipeline/a.py",
        "launcher/__init__.py",
        "launcher/py.typed",
        "slurm/rank.sh",
        "slurm/train.sbatch",
        "solomonov/base.yaml",
        "solomonov/model/layers.py",
    ]
    assert tree(copy).items() <= tree(source).items()
    assert os.access(copy / "slurm" / "rank.sh", os.X_OK)
    assert copy.is_absolute()
    assert list((tmp_path / "code").iterdir()) == [copy], "nothing is left beside it"


def test_the_same_code_is_the_same_folder_wherever_it_comes_from(source: Path, tmp_path: Path) -> None:
    copy = take(source, tmp_path / "code")
    before = (copy / "launcher/__init__.py").stat()
    (source / "launcher/notes.txt").write_text("no code")
    assert take(source, tmp_path / "code") == copy
    assert (copy / "launcher/__init__.py").stat() == before, "it is not written again"
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(source, elsewhere)
    assert take(elsewhere, tmp_path / "other").name == copy.name


@pytest.mark.parametrize("change", ["content", "name", "new", "gone", "script"])
def test_other_code_is_another_folder_and_the_old_one_stays(change: str, source: Path, tmp_path: Path) -> None:
    copy = take(source, tmp_path / "code")
    old = tree(copy)
    file = source / "data_pipeline/a.py"
    if change == "content":
        file.write_text("A = 2\n")
    elif change == "name":
        file.rename(file.with_name("b.py"))
    elif change == "new":
        file.with_name("empty.py").touch()
    elif change == "gone":
        file.unlink()
    else:
        (source / "slurm/rank.sh").write_text("#!/usr/bin/env bash\n")
    other = take(source, tmp_path / "code")
    assert other != copy
    assert tree(copy) == old
    assert tree(other).items() <= tree(source).items()


def test_a_file_that_looks_like_two_is_other_code(source: Path, tmp_path: Path) -> None:
    (source / "data_pipeline/b.py").write_text("B = 1\n")
    two = take(source, tmp_path / "code")
    (source / "data_pipeline/b.py").unlink()
    (source / "data_pipeline/a.py").write_text("A = 1\ndata_pipeline/b.py\0B = 1\n")
    assert take(source, tmp_path / "code") != two


def test_a_copy_that_a_kill_cut_short_is_made_again(source: Path, tmp_path: Path) -> None:
    copy = take(source, tmp_path / "code")
    whole = tree(copy)
    aside = copy.with_name(f".{copy.name}.tmp")
    copy.rename(aside)
    (aside / "solomonov/base.yaml").unlink()
    (aside / "launcher/left.py").write_text("import os\n")
    assert take(source, tmp_path / "code") == copy
    assert tree(copy) == whole
    assert not aside.exists()


def test_a_program_runs_from_the_copy_and_not_from_where_it_starts(tmp_path: Path) -> None:
    copy = snapshot(ROOT, ROOT / "slurm", tmp_path / "code")
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher/__init__.py").write_text("raise SystemExit('the one of the working folder')\n")
    names = ", ".join((*PACKAGES, "launcher.agent", "solomonov.cli"))
    show = f"import {names}; print(*[m.__file__ for m in ({names})], sep='\\n')"
    environment = {**program_environment(), "PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", show], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(copy) for line in done.stdout.splitlines()), done.stdout
    assert len(done.stdout.splitlines()) == 5
