"""The code that a submitted run is started with: a copy in its folder, so that later changes do not reach it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import xxhash

PACKAGES = ("launcher", "solomonov", "data_pipeline")
SUFFIXES = (".py", ".yaml", ".typed")
SCRIPTS = (".sbatch", ".sh")


def snapshot(root: Path, scripts: Path, folder: Path) -> Path:
    """Copy the packages and the Slurm scripts into a folder that is named after what is in them.

    Args:
        root: folder of the packages.
        scripts: folder of the Slurm scripts.
        folder: gets the copy, unless it is there already.

    Returns:
        The copy, absolute; to be put on PYTHONPATH.
    """
    files = _package_files(root)
    files |= {Path("slurm") / path.name: path for path in sorted(scripts.iterdir()) if path.suffix in SCRIPTS}
    target = folder.absolute() / _digest(files)
    if target.exists():
        return target
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    for name, path in files.items():
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, aside / name)
    aside.rename(target)
    return target


def code_digest(root: Path) -> str:
    """A name for what is in the packages of a folder; equal where the code is."""
    return _digest(_package_files(root))


def _package_files(root: Path) -> dict[Path, Path]:
    return {
        path.relative_to(root): path
        for package in PACKAGES
        for path in sorted((root / package).rglob("*"))
        if path.suffix in SUFFIXES and path.is_file()
    }


def _digest(files: Mapping[Path, Path]) -> str:
    digest = xxhash.xxh3_64()
    for name, path in files.items():
        data = path.read_bytes()
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()
