"""Whatever the cache's directory cannot do, a call goes on; what others can write is not loaded."""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import pwd
import re
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from cute_flash import cache, trust
from cute_flash.cache import Artifact, CorruptArtifact

MADE = Artifact(b"\x7fELF host code", b".version 8.0", b"\x7fELF cubin", {"kernel": "made up"})
OTHER = MADE._replace(ptx=b"from elsewhere")
KEY = cache.key_of("sm80.forward", "0123456789abcdef", "problem")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, in a process that has said nothing yet."""
    monkeypatch.setattr(cache, "_told", set())
    monkeypatch.setenv("CUTE_FLASH_CACHE", str(tmp_path / "cache"))
    for name in ("CUTE_FLASH_BUNDLE", trust.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def kept(root: Path, key: str = KEY) -> Path:
    return root / cache.compiler_tag() / f"{key}.kernel"


def asked(key: str = KEY, times: int = 2) -> tuple[list[Artifact], list[str]]:
    """What `get` answers each time, where building gives MADE, and everything that was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [cache.get(key, lambda: MADE) for _ in range(times)]
    return found, [str(warning.message) for warning in said]


def failing(code: int):
    """A function of the system that cannot do it."""

    def fail(*given, **_):
        raise OSError(code, os.strerror(code), str(given))

    return fail


FAULTS = {
    "no locks": (fcntl, "flock", errno.ENOLCK, "has no locks .*No locks available"),
    "locks not built in": (fcntl, "flock", errno.ENOSYS, "has no locks .*not implemented"),
    "no space for a file": (cache.tempfile, "mkstemp", errno.ENOSPC, "cannot be written .*No space"),
    "no space in a file": (zipfile.ZipFile, "writestr", errno.ENOSPC, "cannot be written .*No space"),
    "no quota for its name": (cache.os, "replace", errno.EDQUOT, "cannot be written .*quota"),
    "no space for a directory": (Path, "mkdir", errno.ENOSPC, "cannot be written .*No space"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_file_system_is_said_once(root, monkeypatch, fault):
    place, name, code, text = FAULTS[fault]
    monkeypatch.setattr(place, name, failing(code))
    found, (said,) = asked()
    assert found == [MADE] * 2 and re.search(text, said) and str(root) in said
    assert not list(root.rglob("*.part"))
    assert kept(root).exists() == (name == "flock")


def test_rights_that_cannot_be_changed_are_no_fault(root, monkeypatch):
    monkeypatch.setattr(cache.os, "chmod", failing(errno.EPERM))
    assert asked() == ([MADE] * 2, []) and kept(root).exists()


def test_a_file_that_vanishes_while_it_is_written_is_a_fault_like_others(root, monkeypatch):
    """Say, because the cache is emptied."""
    replace = os.replace

    def late(temporary, path):
        os.unlink(temporary)
        replace(temporary, path)

    monkeypatch.setattr(cache.os, "replace", late)
    found, (said,) = asked()
    assert found == [MADE] * 2 and "No such file" in said


def test_a_lock_that_is_never_given_is_not_waited_for_for_ever(root, monkeypatch):
    monkeypatch.setattr(cache, "_PATIENCE", 0.1)
    path = kept(root).with_suffix(".lock")
    path.parent.mkdir(parents=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found, (said,) = asked()
    assert found == [MADE] * 2 and "another process has held it" in said and kept(root).exists()


@pytest.mark.parametrize("suffix", [".kernel", ".lock"])
def test_a_directory_in_a_file_s_place(root, suffix):
    kept(root).with_suffix(suffix).mkdir(parents=True)
    found, (said,) = asked()
    assert found == [MADE] * 2 and "Is a directory" in said


def test_a_file_that_cannot_be_read_is_written_again(root, monkeypatch):
    asked()
    monkeypatch.setattr(cache, "_read", failing(errno.EIO))
    found, (said,) = asked()
    assert found == [MADE] * 2 and re.search("it cannot be read .*Input/output error", said)


def test_errors_of_the_compiler_are_not_taken_for_the_cache_s():
    def build():
        raise OSError("no space for temporary files")

    with pytest.raises(OSError, match="temporary files"):
        cache.get(KEY, build)


def test_any_bit_that_flips_is_noticed(tmp_path):
    """Whatever the zip's parser makes of it: the kernel that was written, or CorruptArtifact."""
    path = tmp_path / "k.kernel"
    cache.write(path, MADE)
    whole, noticed = path.read_bytes(), 0
    for at in range(len(whole)):
        for bit in (1 << at % 8, 0x80):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            try:
                assert cache.read(path) == MADE, at
            except CorruptArtifact:
                noticed += 1
    assert noticed > len(whole)


# Where the cache is.


def test_the_cache_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.delenv("CUTE_FLASH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, expected in (("/x/cache", "/x/cache"), ("", tmp_path / ".cache"), ("x", tmp_path / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache.cache_directory() == Path(expected) / "cute_flash"


@pytest.mark.parametrize("named", [None, "~nobody-of-this-name/cache"])
def test_no_home_is_a_warning(monkeypatch, named):
    def unknown(user):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    for name in ("HOME", "XDG_CACHE_HOME", "CUTE_FLASH_CACHE"):
        monkeypatch.delenv(name, raising=False)
    if named:
        monkeypatch.setenv("CUTE_FLASH_CACHE", named)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    found, (said,) = asked()
    assert found == [MADE] * 2 and "not kept: Could not determine home directory" in said


# Whose kernels are loaded.


def owned_by(monkeypatch, path: Path, **changed: int) -> None:
    """Have the system say something else of a path, and of descriptors of that file."""
    number, stat = path.stat().st_ino, os.stat

    def told(file, **given):
        found = stat(file, **given)
        fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        return SimpleNamespace(**fields | changed) if found.st_ino == number else found

    monkeypatch.setattr(trust.os, "stat", told)


def planted(root: Path) -> Path:
    """A kernel that is not what building gives, in the cache."""
    kept(root).parent.mkdir(parents=True)
    cache.write(kept(root), OTHER)
    return kept(root)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("mode, whom", [(0o777, "everyone"), (0o1777, "everyone"), (0o775, "its group")])
def test_a_cache_that_others_can_write_is_not_used(root, monkeypatch, level, mode, whom):
    folder = planted(root).parents[level]
    folder.chmod(mode)
    monkeypatch.setattr(trust, "_is_own", lambda group: False)
    before = sorted(root.rglob("*"))
    found, (text,) = asked()
    assert found == [MADE] * 2 and f"{folder} can be written by {whom}" in text
    assert sorted(root.rglob("*")) == before and cache.read(kept(root)) == OTHER
    monkeypatch.setenv(trust.VARIABLE, "1")
    assert asked() == ([OTHER] * 2, [])
    monkeypatch.setenv(trust.VARIABLE, "0")
    assert asked()[0] == [MADE] * 2


def test_a_cache_of_another_user_is_not_used(root, monkeypatch):
    folder = planted(root).parents[1]
    owned_by(monkeypatch, folder, st_uid=12345)
    found, (text,) = asked()
    assert found == [MADE] * 2 and f"{folder} belongs to another user (12345)" in text


def test_root_s_kernels_are_used(root, monkeypatch):
    """Such as a bundle that was installed for everyone."""
    planted(root)
    monkeypatch.setattr(trust.os, "geteuid", lambda: 12345)
    owned_by(monkeypatch, root, st_uid=0)
    monkeypatch.setattr(trust, "_is_own", lambda group: False)
    assert trust.reason_against(root) is None


@pytest.mark.parametrize("mode", [0o666, 0o646])
def test_a_file_that_others_can_write_is_not_used(root, mode):
    """It is compiled again and replaced."""
    planted(root).chmod(mode)
    found, (text,) = asked()
    assert found == [MADE] * 2 and "kernel file ignored" in text and "by everyone" in text
    assert cache.read(kept(root)) == MADE


def test_a_bundle_that_others_can_write_is_not_used(root, tmp_path, monkeypatch):
    bundle = planted(root).parent.rename(tmp_path / "bundle")
    monkeypatch.setenv("CUTE_FLASH_BUNDLE", str(bundle))
    assert asked() == ([OTHER] * 2, [])
    bundle.chmod(0o777)
    found, (text,) = asked()
    assert found == [MADE] * 2 and f"{bundle} is not used, as kernels are native code" in text


@pytest.mark.parametrize(
    "group, members, own", [("me", [], True), ("me", ["me"], True), ("me", ["you"], False), ("us", [], False)]
)
def test_a_user_s_own_group_is_nobody_else(monkeypatch, group, members, own):
    monkeypatch.setattr(pwd, "getpwuid", lambda user: SimpleNamespace(pw_name="me"))
    monkeypatch.setattr(grp, "getgrgid", lambda number: SimpleNamespace(gr_name=group, gr_mem=members))
    assert trust._is_own(7) == own


def test_what_is_made_can_be_written_by_nobody_else(root):
    before = os.umask(0)
    try:
        asked()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (root, kept(root).parent)} == {0o755}
    assert kept(root).stat().st_mode & 0o777 == 0o644


# A bundle that has not what is asked for.


def test_a_bundle_that_names_nothing_says_so(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, said in (("none", "names no directory"), ("file", "names no directory"),
                       ("empty", "a directory without kernels")):  # fmt: skip
        monkeypatch.setenv("CUTE_FLASH_BUNDLE", str(tmp_path / name))
        found, (text,) = asked()
        assert found == [MADE] * 2 and said in text and str(tmp_path / name) in text
        assert said in cache.fault_of_bundle(KEY)


def test_a_bundle_of_other_sources_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CUTE_FLASH_BUNDLE", str(tmp_path / "bundle"))
    (tmp_path / "bundle").mkdir()
    for problem in ("problem", "other"):
        key = cache.key_of("sm80.forward", "fedcba9876543210", problem)
        cache.write(tmp_path / "bundle" / f"{key}.kernel", OTHER)
    found, (text,) = asked()
    assert found == [MADE] * 2 and "from other sources: none of its 2 sm80.forward can be used" in text


def test_a_bundle_made_for_other_calls_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CUTE_FLASH_BUNDLE", str(tmp_path / "bundle"))
    (tmp_path / "bundle").mkdir()
    for kernel, sources in (("sm80.forward", "0123456789abcdef"), ("sm90.forward", "fedcba9876543210")):
        cache.write(tmp_path / "bundle" / f"{cache.key_of(kernel, sources, 'other')}.kernel", OTHER)
    assert asked() == ([MADE] * 2, [])
