"""Text that can be checked is checked: links, the README's tree, verbs and YAML, every file in configs/."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import yaml

from launcher.config import LaunchConfig
from solomonov.cli import build_parser
from solomonov.config import load_config
from tests.support.source_tree import ROOT, fail_with, tracked_files

README = ROOT / "README.md"
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
TREE_ROW = re.compile(r"^( *)(?:[│├└─ ]*)([A-Za-z0-9_.*-]+/?)(?:\s{2,}|$)")


def documents() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".md"]


def readme() -> str:
    return README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return [body for name, body in FENCE.findall(readme()) if name == language]


def verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings get: lower case, spaces to hyphens, other signs dropped."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_relative_links_resolve() -> None:
    wrong = []
    for page in documents():
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            linked = (page.parent / name).resolve() if name else page
            if not linked.exists():
                wrong.append(f"{page.relative_to(ROOT)} links to {target}")
            elif anchor and anchor not in anchors(linked.read_text(encoding="utf-8")):
                wrong.append(f"{page.relative_to(ROOT)} links to {target}: no such heading")
    fail_with(wrong, "a link leads nowhere")


def test_files_named_in_the_text_exist() -> None:
    top = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    wrong = []
    for page in documents():
        if page.name == "CHANGELOG.md":  # it tells of what was
            continue
        text = page.read_text(encoding="utf-8")
        names = re.findall(r"`([\w./-]+/[\w./-]*)`", FENCE.sub("", text))
        names += re.findall(r"\b((?:configs|slurm)/[\w-]+\.\w+)", text)
        wrong += [
            f"{page.relative_to(ROOT)} names {name}"
            for name in names
            if name.split("/")[0] in top and not (ROOT / name).exists()
        ]
    fail_with(wrong, "a file that the text names is not there")


def test_readme_s_tree_lists_what_is_there() -> None:
    trees = [body for body in blocks("text") + blocks("") if "data_pipeline/" in body and "launcher/" in body]
    assert trees, "the README has no block with the tree of the repository"
    listed: list[str] = []
    wrong = []
    for body in trees:
        folders: list[tuple[int, str]] = []
        for line in body.splitlines():
            match = TREE_ROW.match(line)
            if match is None:
                continue
            depth = match.start(2)
            while folders and folders[-1][0] >= depth:
                folders.pop()
            prefix = folders[-1][1] if folders else ""
            path = prefix + match.group(2)
            if match.group(2).endswith("/"):
                folders.append((depth, path))
            listed.append(path)
            if not list(ROOT.glob(path.rstrip("/"))):
                wrong.append(f"the tree names {path}")
    tops = {path.relative_to(ROOT).parts[0] for path in tracked_files() if len(path.relative_to(ROOT).parts) > 1}
    tops = {name for name in tops if not name.startswith(".")}
    wrong += [f"the tree leaves out {name}/" for name in sorted(tops) if f"{name}/" not in listed]
    fail_with(wrong, "the README's tree and the repository differ")


def test_every_verb_that_the_readme_names_exists() -> None:
    known = verbs(build_parser())
    assert known, "the command has no verbs"
    named = re.findall(r"(?:^|[`$ ])(?:\S*/)?solomonov +([a-z][a-z-]*)\b", "\n".join(blocks("console")), re.MULTILINE)
    named += re.findall(r"`solomonov +([a-z][a-z-]*)\b", readme())
    assert named, "the README names no verb"
    fail_with([f"solomonov {verb}" for verb in sorted(set(named) - known.keys())], "a verb that does not exist")


def test_every_make_target_that_the_text_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = {
        name
        for page in documents()
        for name in re.findall(r"(?:^ {4}|`|\$ )make ([a-z]+)\b", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {"quickstart", "test"} <= named, "the README says how to start and how to test"
    fail_with(sorted(named - targets), "a make target that does not exist")


def load_whole(path: Path) -> None:
    """Loads a configuration as a command does, its launch section included."""
    LaunchConfig.model_validate(dict(load_config(path).launch))


def test_readme_s_yaml_is_a_configuration(tmp_path: Path) -> None:
    """Each block by itself or, where it shows some sections only, in place of those of the first config file."""
    found = blocks("yaml")
    assert found, "the README shows no configuration"
    whole = yaml.safe_load(CONFIGS[0].read_text(encoding="utf-8"))
    for number, body in enumerate(found):
        path = tmp_path / f"block-{number}.yaml"
        path.write_text(yaml.safe_dump(whole | yaml.safe_load(body)), encoding="utf-8")
        load_whole(path)


def test_there_are_configurations_but_not_many() -> None:
    assert 0 < len(CONFIGS) <= 12, f"configs/ holds {len(CONFIGS)} files; a dozen at most"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_loads(path: Path) -> None:
    load_whole(path)


def test_readme_s_first_screen_says_how_to_start() -> None:
    lines = readme().splitlines()
    first = "\n".join(lines[:40])
    for words in ("make quickstart", "solomonov/train.py"):
        assert words in first, f"{words!r} does not stand in the README's first 40 lines"
