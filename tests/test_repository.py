"""What holds for the repository as a whole: one version, pins, packages, and what no file may hold."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from tests.support.source_tree import PACKAGES, ROOT, fail_with, tracked_files


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_folder_is_listed_in_pyproject() -> None:
    listed = set(pyproject()["tool"]["setuptools"]["packages"])
    real = {".".join(path.parent.relative_to(ROOT).parts) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert listed == real, f"packages in pyproject.toml and folders with code differ in {sorted(listed ^ real)}"
    for name in sorted(listed):
        assert (ROOT / name.replace(".", "/") / "__init__.py").is_file(), f"{name} has no __init__.py"


def test_version_is_the_changelog_s_newest() -> None:
    project = pyproject()["project"]
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings, "CHANGELOG.md has no `## [version]` heading"
    assert headings[0] == project["version"], "pyproject.toml and the top of CHANGELOG.md name different versions"


def test_no_machine_path_and_no_registry_host_in_any_file() -> None:
    folders = "|".join(("wo" + "rk", "ro" + "ot", "fa" + "rm"))
    hosts = "|".join(("pypi" + r"\.org", "python" + "hosted", "download" + r"\.pytorch", "index" + "-url"))
    pattern = re.compile(rf"(?<![\w.)}}\]*~$-])/({folders})/|{hosts}")
    wrong = []
    for path in tracked_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), start=1):
            if match := pattern.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number} {match.group()}")
    fail_with(wrong, "paths of one machine and addresses of registries stay out of the repository")


def test_constraints_pin_every_declared_dependency() -> None:
    project = pyproject()["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    wrong = [line for line in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line)]
    fail_with(wrong, "a line of constraints.txt that is no plain pin")
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in pins}
    declared = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9_.-]", item)[0]).lower() for item in declared}
    assert names <= pinned, f"constraints.txt does not pin {sorted(names - pinned)}"
