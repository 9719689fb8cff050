"""Loads the compiled part, or says why it cannot be and what mends it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_MEND = "pip install --no-build-isolation --force-reinstall --no-deps softmax_ext"
_MEND_CHECKOUT = "pip install --no-build-isolation -e ."


def _mend() -> str:
    in_checkout = (Path(__file__).parent.parent / "setup.py").exists()
    return f"Build it for this torch with:\n    {_MEND_CHECKOUT if in_checkout else _MEND}"


def _release(version: str) -> list[str]:
    """Major and minor: the binary interface of torch changes between minor versions."""
    return version.split(".")[:2]


def build_record(folder: Path | None = None) -> dict[str, Any]:
    """What setup.py wrote of the build: torch, cuda, architectures. Empty if there was none."""
    path = (folder or Path(__file__).parent) / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def check(record: dict[str, Any], torch_version: str, torch_cuda: str | None) -> None:
    """Raises ImportError if an extension of this record cannot run with this torch."""
    if not record:
        raise ImportError(
            f"softmax_ext._C has not been built. The torch found is {torch_version}. {_mend()}"
        )
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
    """The module softmax_ext._C."""
    record = build_record()
    check(record, torch.__version__, torch.version.cuda)
    try:
        return importlib.import_module("softmax_ext._C")
    except ImportError as error:
        if str(error).startswith("SOFTMAX_EXT_"):  # a variable of the environment, by name
            raise
        raise ImportError(
            f"softmax_ext._C, built for torch {record['torch']}, could not be loaded with torch "
            f"{torch.__version__}: {error}. {_mend()}"
        ) from error
