"""A container's limit is the machine's memory."""

import pytest

from grpo_ds.system.hardware import cgroup_limit, ram_gib

GIB = 2**30


def limit(tmp_path, membership, files):
    """cgroup_limit over a mount with these files."""
    (tmp_path / "self").write_text(membership)
    for name, text in files.items():
        file = tmp_path / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return cgroup_limit(tmp_path / "self", tmp_path / "mount")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"memory.max": 8 * GIB}, 8 * GIB),  # a container sees its own group as the root
        ("0::/a/b", {"a/memory.max": 4 * GIB, "a/b/memory.max": "max"}, 4 * GIB),  # the parent's limit holds
        ("0::/a/b", {"memory.max": 9, "a/memory.max": 7, "a/b/memory.max": 8}, 7),  # the tightest of all
        ("0::/", {"memory.max": "max"}, None),
        ("0::/gone", {}, None),
        ("4:memory:/x", {"memory/x/memory.limit_in_bytes": 2 * GIB}, 2 * GIB),  # v1
        ("4:cpu,memory:/host/path", {"memory/memory.limit_in_bytes": 3 * GIB}, 3 * GIB),  # v1 in a container
        ("3:cpu:/x\n4:memory:/", {"memory/memory.limit_in_bytes": 2**63 - 4096}, 2**63 - 4096),  # v1's "no limit"
        ("0::/a\n4:memory:/", {"a/memory.max": 5, "memory/memory.limit_in_bytes": 6}, 5),  # both mounted
        ("", {"memory.max": 1}, None),
    ],
)
def test_the_tightest_limit_around_this_process(tmp_path, membership, files, expected):
    assert limit(tmp_path, membership, files) == expected


def test_without_proc_there_is_no_limit(tmp_path):
    assert cgroup_limit(tmp_path / "none", tmp_path) is None


def test_ram_is_never_more_than_the_limit(monkeypatch):
    whole = ram_gib()
    monkeypatch.setattr("grpo_ds.system.hardware.cgroup_limit", lambda: GIB // 2)
    assert ram_gib() == 0.5 < whole
    monkeypatch.setattr("grpo_ds.system.hardware.cgroup_limit", lambda: 2**62)  # v1 without a limit
    assert 0.5 < ram_gib() < 2**20
