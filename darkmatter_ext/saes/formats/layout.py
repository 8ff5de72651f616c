"""What every layout is: names of files, and two readers."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darkmatter_ext.runtime.storage import parsed_json, require_bounded_archive

Config = dict[str, Any]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where an SAE's files are."""

    folder: Path
    weights: Path
    shared: bool = False  # several SAEs have this folder

    @property
    def name(self) -> str:
        """Of the SAE: its folder's, or its file's where the folder has several."""
        return self.weights.name.partition(".")[0] if self.shared else self.folder.resolve().name


@dataclass(frozen=True)
class Format:
    """One library's layout of a folder."""

    name: str
    config_name: str | None  # None: the weights' file is all there is
    weights_names: tuple[str, ...]  # below the folder, the first that is there; a pattern: each match is an SAE
    config: Callable[[Place], Config]  # SAELens' configuration with `metadata`
    weights: Callable[[Place, Config], Weights]  # and its configuration -> SAELens' state_dict

    @property
    def files(self) -> str:
        """Their names, for a message."""
        return " and ".join(name for name in (self.config_name, self.weights_names[0]) if name)

    def _has_config(self, folder: Path) -> bool:
        return self.config_name is None or (folder / self.config_name).is_file()

    def places_in(self, folder: Path) -> list[Place]:
        """The SAEs of a folder, in the order of the numbers in their names."""
        if not self._has_config(folder):
            return []
        for pattern in self.weights_names:
            if found := sorted(filter(Path.is_file, folder.glob(pattern)), key=_by_number):
                return [Place(folder, path, "*" in pattern) for path in found]
        return []

    def place_of_file(self, path: Path) -> Place | None:
        """The SAE whose weights a file holds; None for another layout's."""
        for pattern in self.weights_names if path.is_file() else ():
            if path.absolute().match(pattern):
                folder = path.absolute().parents[pattern.count("/")]
                if self._has_config(folder):
                    return Place(folder, path, "*" in pattern)
        return None

    def converter(self, place: Place) -> Callable[..., tuple[Config, Weights]]:
        """What SAELens' `load_from_disk` takes."""

        def convert(_path: Any, device: str, cfg_overrides: Config | None = None) -> tuple[Config, Weights]:
            from sae_lens import __version__

            config: Config = {**self.config(place), "device": device, **(cfg_overrides or {})}
            config["metadata"].setdefault("sae_lens_version", __version__)  # else it is taken for an old file again
            return config, {name: tensor.to(device) for name, tensor in self.weights(place, config).items()}

        return convert


def _by_number(path: Path) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", path.name)], path.name


def read_json(path: Path) -> Config:
    """A configuration as it is written."""
    return parsed_json(path.read_text())


def unpickled(path: Path) -> Any:
    """What torch saved, tensors and plain containers alone: no code in a file is run. Mapped, not read, where it can be."""
    require_bounded_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def dtype_name(tensor: Tensor) -> str:
    """`float32`, as a configuration names it."""
    return str(tensor.dtype).removeprefix("torch.")


def said(metadata: Config) -> Config:
    """Without what the files do not say."""
    return {key: value for key, value in metadata.items() if value is not None}


def require_tensors(found: Mapping[str, Any], names: tuple[str, ...], file: str) -> None:
    """Raises ValueError, naming what is missing, unless a file holds tensors of these names."""
    if missing := [name for name in names if not isinstance(found.get(name), Tensor)]:
        raise ValueError(f"{file} must have {', '.join(names)}, got none named {', '.join(missing)}")
