"""A small disk that can be filled."""

import subprocess
from contextlib import suppress
from pathlib import Path

_BLOCK = b"\0" * 65_536


class SmallDisk:
    """A file system of its own in ``folder``, of ``megabytes``. Mounting needs root: raises CalledProcessError."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        folder.mkdir()
        options = f"size={megabytes}m,mode=0700"
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, stderr=subprocess.DEVNULL
        )
        self._ballast = folder / ".ballast"

    def fill(self) -> None:
        """Use all space that is left."""
        with suppress(OSError), self._ballast.open("ab", buffering=0) as file:
            while file.write(_BLOCK):
                pass

    def free(self) -> None:
        """Give the space back."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the file system with all that is in it."""
        subprocess.run(["umount", "--lazy", str(self.folder)], check=False, stderr=subprocess.DEVNULL)
