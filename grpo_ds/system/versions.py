"""The versions installed, against those this package needs: read from their metadata, with none of them imported."""

from collections.abc import Iterable, Iterator
from importlib import metadata

from packaging.requirements import Requirement

from grpo_ds.errors import PreflightError, one_error

# Where a version that is too old does not fail but trains something else.
WHY = {
    "deepspeed": "before 0.19.0 it lost the gradients of all backwards of a step but one, and said nothing",
    "bitsandbytes": "before 0.50 its 8-bit AdamW does not step on a CPU",
    "transformers": "before 5.0 attention of our own cannot be registered the way packed rows need it",
}


def check_versions() -> None:
    """Raise PreflightError, one for all packages that are too old or too new."""
    if problems := list(version_problems(requirements())):
        remedy = "Install what is known to work: make install, or pip install -U -c constraints.txt -e ."
        raise one_error(PreflightError, "Installed versions this trainer cannot be trusted with:", problems, remedy)


def requirements() -> list[str]:
    """setup.cfg's, as they were written down on installation; [] for a copy that was not installed."""
    try:
        return metadata.requires("grpo_ds") or []
    except metadata.PackageNotFoundError:
        return []


def version_problems(wanted: Iterable[str]) -> Iterator[str]:
    """A line for each package in a version that `wanted`, such as "deepspeed>=0.19.6", rules out."""
    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:  # its import says so where it is needed, and not all are
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            why = f": {WHY[requirement.name]}" if requirement.name in WHY else ""
            yield f"{requirement.name} {found}, but {requirement.specifier} is needed{why}"
