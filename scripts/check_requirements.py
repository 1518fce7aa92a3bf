"""Tell whether this Python has what requirements files ask for, without importing any of it.

    python scripts/check_requirements.py requirements.txt [more files]

Ends with status 0 if all is there in the right version; else with 1, after a line for each thing that is not.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # a bare Python has it inside pip alone
    from pip._vendor.packaging.requirements import Requirement


def requirements(path: Path) -> list[Requirement]:
    """The requirements of a file, and of those that its `-r` lines name."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            found += requirements(path.parent / line[3:].strip())
        elif line:
            found.append(Requirement(line))
    return found


def lacking(paths: list[Path]) -> list[str]:
    """What is missing or of another version, one message each."""
    messages = []
    for requirement in (item for path in paths for item in requirements(path)):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            messages.append(f"{requirement}: not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            messages.append(f"{requirement}: installed is {installed}")
    return messages


if __name__ == "__main__":
    found = lacking([Path(argument) for argument in sys.argv[1:]])
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))
