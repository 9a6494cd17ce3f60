"""Files that come with the package, found from every folder: DeepSpeed's JSONs and worked configs.

In a checkout their folders stand at the top, where commands name them; in a wheel, inside the package (setup.py).
"""

import os
from dataclasses import dataclass
from pathlib import Path

from grpo_ds.errors import UsageError
from grpo_ds.settings.paths import absolute_if_there

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Shipped:
    """The files of one shipped folder, and the flag that names one of them.

    Example: `--ds zero2.json` is `--ds ds_configs/zero2.json`, unless the working folder has such a file
        >>> DS_JSONS.find("zero2.json") == DS_JSONS.find("ds_configs/zero2.json")
        True
    """

    flag: str
    name: str  # of the folder
    suffix: str

    @property
    def folder(self) -> Path:
        inside = PACKAGE / self.name
        return inside if inside.is_dir() else PACKAGE.parent / self.name

    def names(self) -> list[str]:
        """Names as a user types them, sorted: ds_configs/zero2.json."""
        return sorted(f"{self.name}/{file.name}" for file in self.folder.glob(f"*{self.suffix}"))

    def find(self, path: str | Path) -> Path:
        """Return the file at this path, otherwise the shipped file of this name. Raises UsageError."""
        path, names = Path(os.path.expanduser(path)), self.names()
        is_there, is_folder = os.path.exists(path), os.path.isdir(path)  # Path's own raise OSError for a long name
        if is_there and not is_folder:
            return path
        if not is_there and (shipped := self._by_name(path)):
            return shipped
        what = "is a folder, not a file" if is_folder else "does not exist"
        raise UsageError(f"--{self.flag} {path}: {what}. Shipped: {', '.join(names)} (in {self.folder}).")

    def setting(self, text: str) -> str:
        """Return what the flag holds: the absolute path of a user's file; a shipped file is its name, everywhere."""
        path, shipped = absolute_if_there()(text), self._by_name(Path(text))
        return text if shipped and os.path.exists(path) and os.path.samefile(path, shipped) else path

    def _by_name(self, path: Path) -> Path | None:
        """Return the shipped file that the path would name if nothing were there."""
        known = path.parent in (Path(), Path(self.name)) and f"{self.name}/{path.name}" in self.names()
        return self.folder / path.name if known else None


DS_JSONS = Shipped("ds", "ds_configs", ".json")
CONFIGS = Shipped("config", "configs", ".yaml")
