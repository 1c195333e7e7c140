"""Environments of other programs that read our files, each in a folder of its own, installed once."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOME = Path(os.environ.get("DSV2_CLIENTS") or Path.home() / ".cache" / "deepseek-v2-toolkit" / "clients")


@dataclass(frozen=True)
class Client:
    """A program: what pip installs for it, the packages whose versions are reported, the environment variables it
    needs, and packages that come along but are built for another torch."""

    name: str
    requirements: tuple[str, ...]
    packages: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        """Its Python; the folder is named after the requirements, so that others get another one."""
        digest = hashlib.sha256("\n".join((sys.version, *self.requirements)).encode()).hexdigest()[:8]
        return HOME / f"{self.name}-{digest}" / "bin" / "python"

    def install(self) -> None:
        """Make the environment if it is not there. Raises CalledProcessError with pip's output."""
        ready = self.python.parents[1] / ".installed"
        if ready.exists():
            return
        subprocess.run([sys.executable, "-m", "venv", "--clear", self.python.parents[1]], check=True)
        subprocess.run([self.python, "-m", "pip", "install", "-q", *self.requirements], check=True)
        if self.without:
            subprocess.run([self.python, "-m", "pip", "uninstall", "-q", "-y", *self.without], check=True)
        ready.touch()

    def run(self, program: str, request: dict[str, Any], cwd: Path) -> Any:
        """Run a program that reads a JSON request from its arguments and prints a JSON answer as its last line.

        Our packages are not in this environment, and the folder has none of them.
        """
        self.install()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        done = subprocess.run(
            [self.python, "-c", program, json.dumps(request)],
            cwd=cwd, env={**kept, "HF_HUB_OFFLINE": "1", **self.environment}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    def versions(self) -> str:
        """The installed versions, for docs/clients.md."""
        code = f"from importlib.metadata import version; print(*(f'{{p}} {{version(p)}}' for p in {self.packages}))"
        return subprocess.run([self.python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
