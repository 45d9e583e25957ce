"""Whose files are loaded: compiled kernels are native code, and whoever can write them runs code here.

Trusted is what belongs to this process's user or to root and can be written by nobody else. A group with the
user's name and no other member, which many systems make, is nobody else. CUTE_FLASH_TRUST_CACHE=1 trusts all.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

VARIABLE = "CUTE_FLASH_TRUST_CACHE"


def reason_against(file: Path | int, name: Path | None = None) -> str | None:
    """Why a file or directory is not trusted; None where it is, or does not exist.

    file: a path or an open file's descriptor; name: what to call the latter.
    """
    if os.environ.get(VARIABLE, "") not in ("", "0"):
        return None
    try:
        # In a user namespace root has another number: that of whoever owns /.
        found, owners = os.stat(file), {os.geteuid(), 0, os.stat("/").st_uid}
    except (FileNotFoundError, NotADirectoryError):
        return None
    if found.st_uid not in owners:
        return f"{name or file} belongs to another user ({_name_of(found.st_uid)})"
    if found.st_mode & stat.S_IWOTH:
        return f"{name or file} can be written by everyone (chmod o-w)"
    if found.st_mode & stat.S_IWGRP and not _is_own(found.st_gid):
        return f"{name or file} can be written by its group {found.st_gid} (chmod g-w)"
    return None


def _is_own(group: int) -> bool:
    """Whether a group has its user's name and nobody else in it."""
    try:
        user, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == user and {*found.gr_mem} <= {user}


def _name_of(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
