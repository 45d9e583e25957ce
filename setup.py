"""What pyproject.toml has no words for: packages of two folders, found by rule, and the wheel's platform."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup

# cute_flash.arch is the folder arch/. Python is all that is packed, but what it loads is x86-64 host code,
# and the compiler is built for this platform.
PLATFORM = "manylinux_2_28_x86_64"

packages = find_packages(include=["cute_flash", "cute_flash.*"])
packages += [f"cute_flash.{name}" for name in find_packages(include=["arch", "arch.*"])]

# A wheel is made from all that is here: files of an earlier build, since deleted, would be packed, too.
shutil.rmtree(Path(__file__).parent / "build" / "lib", ignore_errors=True)

setup(packages=packages, options={"bdist_wheel": {"plat_name": PLATFORM, "python_tag": "py3"}})
