"""Loads the compiled part, or says why it cannot be and what mends it."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

_PACKAGE = Path(__file__).resolve().parent


def _source() -> str | None:
    """What pip can build this package from again: the checkout it is in, or else the folder, the
    sdist or the repository that pip has recorded, where it is still there."""
    if (_PACKAGE.parent / "setup.py").exists():
        return f'-e "{_PACKAGE.parent}"'
    try:
        installed = distribution("softmax_ext")
        record = installed.read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    if record is None or Path(str(installed.locate_file("softmax_ext"))).resolve() != _PACKAGE:
        return None
    origin = json.loads(record)
    if "vcs_info" in origin:
        return f'"{origin["vcs_info"]["vcs"]}+{origin["url"]}"'
    url = urlsplit(origin["url"])
    path = Path(url2pathname(url.path))
    if url.scheme != "file" or path.suffix == ".whl" or not path.exists():
        return None
    return f'"{path}"'


def _mend() -> str:
    """There is no package of this name in any index, so pip must be given the source."""
    source, where = _source(), ""
    if source is None:
        source, where = ".", ", in the folder of its checkout or unpacked sdist,"
    return f"Build it for this torch{where} with:\n    pip install --no-build-isolation {source}"


def _release(version: str) -> list[str]:
    """Major and minor: the binary interface of torch changes between minor versions."""
    return version.split(".")[:2]


def build_record(folder: Path | None = None) -> dict[str, Any]:
    """What setup.py wrote of the build: version, torch, cuda, architectures. Empty if none."""
    path = (folder or _PACKAGE) / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _hidden() -> Path | None:
    """A built package that would be found if this one were not."""
    for entry in sys.path:
        folder = Path(entry).resolve() / "softmax_ext"
        if folder != _PACKAGE and build_record(folder):
            return folder
    return None


def check(record: dict[str, Any], torch_version: str, torch_cuda: str | None) -> None:
    """Raises ImportError if an extension of this record cannot run with this torch."""
    if not record:
        hidden = _hidden()
        reason = f"softmax_ext._C has not been built in {_PACKAGE}"
        if hidden:
            reason += (
                f", which hides the package built in {hidden}: start Python in another folder to "
                "use that one"
            )
        raise ImportError(f"{reason}. The torch found is {torch_version}. {_mend()}")
    built, cuda = record["torch"], record["cuda"]
    if _release(built) != _release(torch_version):
        raise ImportError(
            f"softmax_ext._C was built for torch {built}, but torch {torch_version} was found. "
            f"{_mend()}"
        )
    if cuda is not None and (torch_cuda or "").split(".")[0] != cuda.split(".")[0]:
        raise ImportError(
            f"softmax_ext._C was built for torch {built} with CUDA {cuda}, but torch "
            f"{torch_version} with CUDA {torch_cuda} was found. {_mend()}"
        )


def load() -> ModuleType:
    """The module softmax_ext._C. What it refuses itself, such as the value of a variable, is no
    fault of the build, and passes as it is."""
    record = build_record()
    check(record, torch.__version__, torch.version.cuda)
    try:
        return importlib.import_module("softmax_ext._C")
    except ImportError as error:
        # The import system names the file that it could not link, or the module that is missing.
        if error.path is None and error.name is None:
            raise
        raise ImportError(
            f"softmax_ext._C, built for torch {record['torch']}, could not be loaded with torch "
            f"{torch.__version__}: {error}. {_mend()}"
        ) from error
