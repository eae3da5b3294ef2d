"""Where a run's folder is, by tables as the kernels of real machines write them, and by this machine's own."""

from __future__ import annotations

import socket
import subprocess
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from launcher import shared_storage
from launcher.config import LaunchConfig
from launcher.errors import LaunchConfigurationError
from launcher.shared_storage import (
    DISKS,
    MEMORY,
    Mount,
    find_mount,
    is_exported,
    is_this_machine,
    mount_of,
    other_machine,
    require_shared,
)

AUTO, YES = LaunchConfig(), LaunchConfig(shared_folder="yes")
ELSEWHERE = "192.0.2.7"
"""An address that is nobody's (RFC 5737)."""

LOGIN_NODE = r"""
23 29 0:22 / /proc rw,nosuid,nodev,noexec,relatime shared:13 - proc proc rw
24 29 0:5 / /dev rw,nosuid shared:2 - devtmpfs devtmpfs rw,size=131827044k,nr_inodes=32956761,mode=755,inode64
25 24 0:24 / /dev/shm rw,nosuid,nodev shared:3 - tmpfs tmpfs rw,inode64
29 1 253:0 / / rw,relatime shared:1 - xfs /dev/mapper/rl-root rw,attr2,inode64,logbufs=8,logbsize=32k,noquota
41 29 0:38 / /home rw,relatime shared:71 - nfs4 10.0.0.5:/export/home rw,vers=4.2,rsize=1048576,hard,proto=tcp
42 41 259:3 / /home/ada/scratch rw,relatime shared:72 - ext4 /dev/nvme0n1p1 rw
43 29 0:47 / /lustre/fs\0401 rw,nosuid shared:73 - lustre 10.1.0.1@o2ib:/fs1 rw,checksum,flock,nouser_xattr,lruresize
44 29 0:48 / /gpfs rw,relatime shared:74 - gpfs gpfs0 rw
45 29 0:49 / /data rw,relatime shared:75 - autofs /etc/auto.data rw,fd=7,pgrp=1,timeout=300,minproto=5,maxproto=5
46 45 0:50 / /data/vision rw,relatime shared:76 - beegfs beegfs_nodev rw,cfgFile=/etc/beegfs/client.conf
47 29 0:51 / /mnt/weka rw - wekafs default/fs1 rw,relatime,writecache,inode_bits=auto
48 29 0:52 / /mnt/ours rw,nosuid,nodev - fuse.sshfs ada@host:/ rw,user_id=1000,group_id=1000
"""
CONTAINER = """
1602 1384 0:321 / / rw,relatime master:558 - overlay overlay rw,lowerdir=/l/A:/l/B,upperdir=/d/diff,workdir=/d/work
1603 1602 0:326 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw
1604 1602 0:327 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755,inode64
1607 1604 0:325 / /dev/shm rw,nosuid,nodev,noexec,relatime - tmpfs shm rw,size=65536k,inode64
1608 1602 0:61 /runs /runs rw,relatime - nfs4 10.0.0.5:/export/home rw,vers=4.2
1609 1602 8:2 /var/lib/hosts /etc/hosts rw,relatime - ext4 /dev/sda2 rw
"""


@pytest.mark.parametrize(
    ("table", "place", "device", "expected"),
    [
        (LOGIN_NODE, "/home/ada/runs/own", "0:38", Mount(Path("/home"), "nfs4")),
        (LOGIN_NODE, "/home/ada/scratch/runs", "259:3", Mount(Path("/home/ada/scratch"), "ext4")),
        (LOGIN_NODE, "/home/ada/scratch2", "0:38", Mount(Path("/home"), "nfs4")),  # a longer word is another folder
        (LOGIN_NODE, "/homes", "253:0", Mount(Path("/"), "xfs")),
        (LOGIN_NODE, "/lustre/fs 1/ada", "0:47", Mount(Path("/lustre/fs 1"), "lustre")),
        (LOGIN_NODE, "/lustre", "253:0", Mount(Path("/"), "xfs")),
        (LOGIN_NODE, "/dev/shm", "0:24", Mount(Path("/dev/shm"), "tmpfs")),
        (LOGIN_NODE, "/data/vision/runs", "0:50", Mount(Path("/data/vision"), "beegfs")),
        (LOGIN_NODE, "/data/audio", "0:49", Mount(Path("/data"), "autofs")),
        (CONTAINER, "/workspace/runs", "0:321", Mount(Path("/"), "overlay")),
        (CONTAINER, "/runs/own", "0:61", Mount(Path("/runs"), "nfs4")),
        # What stat names of a btrfs is not in the table.
        ("25 1 0:20 /@ / rw - btrfs /dev/sda2 rw\n60 25 0:20 /@home /home rw - btrfs /dev/sda2 rw", "/home/ada", "0:43",
         Mount(Path("/home"), "btrfs")),
        # The last one mounted at a place hides what was there, and a mount above it what is below.
        ("20 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 20 0:40 / /a rw - nfs h:/ rw\n31 30 0:41 / /a rw - tmpfs none rw",
         "/a/runs", "0:41", Mount(Path("/a"), "tmpfs")),
        ("20 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 20 0:40 / /a rw - nfs h:/ rw\n31 30 0:41 /@ /a rw - btrfs /dev/b rw",
         "/a/runs", "0:77", Mount(Path("/a"), "btrfs")),
        ("20 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 20 8:9 / /a/b rw - xfs /dev/sdb rw\n31 20 0:41 / /a rw - nfs h:/ rw",
         "/a/b/runs", "0:41", Mount(Path("/a"), "nfs")),
        ("", "/home", "0:1", None),
    ],
)  # fmt: skip
def test_the_mount_of_a_place(table: str, place: str, device: str, expected: Mount | None) -> None:
    assert find_mount(Path(place), device, table.strip()) == expected


def test_the_mounts_of_this_machine(tmp_path: Path) -> None:
    """What is not there yet will be where its parent is, and a link is where it leads."""
    assert mount_of(Path("/dev/shm/no/such/folder")) == Mount(Path("/dev/shm"), "tmpfs")
    assert mount_of(Path("/proc/self")) == Mount(Path("/proc"), "proc")
    df = subprocess.run(["df", "--output=fstype,target", tmp_path], capture_output=True, text=True, check=True)
    kind, target = df.stdout.splitlines()[1].split(maxsplit=1)
    assert mount_of(tmp_path / "not" / "there") == mount_of(tmp_path) == Mount(Path(target), kind)
    (tmp_path / "runs").symlink_to("/dev/shm/runs-that-are-not-there")
    assert mount_of(tmp_path / "runs" / "own") == Mount(Path("/dev/shm"), "tmpfs")
    (tmp_path / "round").symlink_to("round")
    assert mount_of(tmp_path / "round" / "own") == Mount(Path(target), kind)


def test_where_the_system_does_not_tell_all_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_storage, "MOUNTS", tmp_path / "no-proc-here")
    assert mount_of(Path("/dev/shm")) is None
    require_shared(Path("/dev/shm"), AUTO, lambda: ELSEWHERE)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, of which `on` decides where it is; nothing is exported."""
    monkeypatch.setattr(shared_storage, "EXPORTS", tmp_path / "etab")
    return tmp_path / "runs" / "own"


def on(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table says that the folder of the runs is of that kind."""
    table = folder.parents[1] / "mountinfo"
    table.write_text(f"20 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 20 0:9999 / {folder.parents[1]} rw - {kind} any rw\n")
    monkeypatch.setattr(shared_storage, "MOUNTS", table)


def never() -> NoReturn:
    raise AssertionError("nobody need be asked")


@pytest.mark.parametrize("kind", sorted(DISKS))
def test_a_disk_of_this_machine_is_refused_where_there_are_others(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(kind, folder, monkeypatch)
    with pytest.raises(LaunchConfigurationError, match="not on shared storage") as caught:
        require_shared(folder, AUTO, lambda: ELSEWHERE)
    assert caught.value.exit_code == 78
    place = f"{folder} is on {kind}, mounted at {folder.parents[1]}"
    assert caught.value.got == f"{place}: a disk of this machine, and {ELSEWHERE} is another one"
    assert "run.folder" in caught.value.remedy
    assert "launch.shared_folder=yes" in caught.value.remedy
    require_shared(folder, AUTO, lambda: None)
    require_shared(folder, YES, never)


@pytest.mark.parametrize("kind", sorted(MEMORY))
def test_the_memory_of_this_machine_is_refused_in_any_case(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not outlive the machine, and the run should."""
    on(kind, folder, monkeypatch)
    with pytest.raises(LaunchConfigurationError, match="not on shared storage") as caught:
        require_shared(folder, AUTO, never)
    assert "the memory of this machine" in caught.value.got
    require_shared(folder, YES, never)


@pytest.mark.parametrize(
    "kind",
    [
        *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "glusterfs", "fuse.glusterfs", "wekafs"),
        *("9p", "virtiofs", "afs", "orangefs", "gfs2", "ocfs2", "fuse.sshfs", "fuse.juicefs", "fuse.s3fs", "autofs"),
        *("pvfs2", "panfs", "of-the-future"),  # unknown to us
    ],
)
def test_a_file_system_of_a_network_passes_and_so_does_an_unknown_one(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(kind, folder, monkeypatch)
    require_shared(folder, AUTO, never)


def test_a_real_memory_file_system_is_refused() -> None:
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
        pytest.raises(LaunchConfigurationError, match="not on shared storage") as caught,
    ):
        require_shared(Path(memory) / "runs" / "own", AUTO, lambda: None)
    assert f"{memory}/runs/own is on tmpfs, mounted at /dev/shm" in caught.value.got


def test_a_disk_that_is_exported_may_be_seen_by_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine on which people log in, and which gives its disk to the nodes."""
    on("ext4", folder, monkeypatch)
    exports = folder.parents[1] / "etab"
    exports.write_text("/home\t10.0.0.0/24(rw,sync,wdelay,hide,nocrossmnt,secure,root_squash)\n\n")
    assert not is_exported(folder)
    with pytest.raises(LaunchConfigurationError):
        require_shared(folder, AUTO, lambda: ELSEWHERE)
    with exports.open("a") as file:
        file.write(f"/home/a\\040b\t*(ro)\n{folder.parents[1]}\t*(rw)\n")
    require_shared(folder, AUTO, never)
    assert is_exported(Path("/home/a b/runs/own"))


# --- which machine is this one ---------------------------------------------------------------------------------------


def test_what_stands_for_this_machine() -> None:
    for own in ("127.0.0.1", "127.0.0.14", "localhost", own_address()):
        assert is_this_machine(own), own
    for other in (ELSEWHERE, "no-such-host.invalid", "", "a" * 70, "(null)"):
        assert not is_this_machine(other), other


def own_address() -> str:
    """That of a network card, where there is one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ELSEWHERE, 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def test_the_first_other_machine_is_named() -> None:
    assert other_machine(["127.0.0.11", "127.0.0.12", "localhost"]) is None
    assert other_machine(["127.0.0.11", ELSEWHERE, "192.0.2.8"]) == ELSEWHERE
    assert other_machine([]) is None
