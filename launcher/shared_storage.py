"""Whether the machines of a cluster see a run's folder, as far as the file system tells that it is on."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from launcher.config import LaunchConfig
from launcher.errors import LaunchConfigurationError

MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
"""Kinds of file systems that are in the memory of one machine, and gone when it is started anew."""
DISKS = frozenset(
    {
        *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "nilfs2", "reiserfs", "erofs"),
        *("vfat", "msdos", "exfat", "ntfs", "ntfs3", "fuseblk", "hfsplus", "iso9660", "udf", "squashfs"),
        *("overlay", "aufs"),  # of a container
    }
)
"""Kinds that one machine mounts at a time. Those of a network (nfs4, lustre, gpfs, fuse.sshfs, 9p, ...) and those
that we do not know pass; whether all machines have the same folder there is looked at before the first step."""
MOUNTS = Path("/proc/self/mountinfo")
EXPORTS = Path("/var/lib/nfs/etab")
"""What this machine gives to others by NFS; readable for all where it stands."""


@dataclass(frozen=True)
class Mount:
    """A file system in its place."""

    point: Path
    kind: str
    """As Linux calls it."""


def require_shared(folder: Path, config: LaunchConfig, elsewhere: Callable[[], str | None]) -> None:
    """Refuse a run's folder that other machines surely do not see; the others are looked at before the first step.

    Args:
        folder: of the run; it need not be there yet.
        elsewhere: gives a machine that may run it and is not this one, None where there is none (`other_machine`);
            asked where the folder is on a disk.

    Raises:
        LaunchConfigurationError: it is in this machine's memory, or on its disk and not all of them are this machine.
    """
    mount = mount_of(folder) if config.shared_folder == "auto" else None
    if mount is None:
        return
    if mount.kind in MEMORY:
        raise _refusal(folder, mount, "the memory of this machine")
    if mount.kind in DISKS and not is_exported(folder) and (other := elsewhere()) is not None:
        raise _refusal(folder, mount, f"a disk of this machine, and {other} is another one")


def _refusal(folder: Path, mount: Mount, where: str) -> LaunchConfigurationError:
    return LaunchConfigurationError(
        "the run's folder is not on shared storage",
        got=f"{folder.absolute()} is on {mount.kind}, mounted at {mount.point}: {where}",
        rule="all nodes of the run, and the next ones after a requeue, see the run's folder",
        remedy="set run.folder to a place on the cluster's shared file system; where all nodes see this one under the "
        "same path, say so: launch.shared_folder=yes",
    )


def mount_of(path: Path) -> Mount | None:
    """The file system that a path is on, or will be once it is made; None where the system does not tell."""
    place = Path(os.path.realpath(path))
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    try:
        device = os.stat(place).st_dev  # first: it mounts what is mounted on demand
        table = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    return find_mount(place, f"{os.major(device)}:{os.minor(device)}", table)


def find_mount(place: Path, device: str, table: str) -> Mount | None:
    """The file system of a place.

    Args:
        place: absolute, without links.
        device: major:minor of what is there, by which a mount is known that hides deeper ones. Some kinds (btrfs) have
            another one in the table.
        table: text of /proc/self/mountinfo.
    """
    covering: list[tuple[str, Mount]] = []
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        words, kind = before.split(" "), after.partition(" ")[0]
        point = Path(_plain(words[4]))
        if place.is_relative_to(point):
            covering.append((words[2], Mount(point, kind)))
    seen = [mount for number, mount in covering if number == device] or [mount for _, mount in covering]
    # Of several at one place, the last one hides the others.
    return max(reversed(seen), key=lambda mount: len(mount.point.parts), default=None)


def _plain(text: str) -> str:
    r"""A path as the kernel and exportfs write it, where a space is \040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def is_exported(path: Path) -> bool:
    """This machine gives it to others by NFS: they may see it, though it is on a disk here."""
    try:
        lines = EXPORTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    place = Path(os.path.realpath(path))
    return any(place.is_relative_to(_plain(line.partition("\t")[0])) for line in lines if line.startswith("/"))


def other_machine(hosts: Iterable[str]) -> str | None:
    """The first of these names or addresses that does not stand for this machine; None where all do."""
    return next((host for host in hosts if not is_this_machine(host)), None)


def is_this_machine(host: str) -> bool:
    """A name or an address stands for this machine: it can be listened on."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError:
            continue
        return True
    return False
