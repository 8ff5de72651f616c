"""The result of an experiment: one JSON file with config, numbers by name, series for figures, and provenance.

Per-token values (losses, token ids) go into one `.npz` file of the same name beside it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkmatter_ext.runtime.html import html_table
from darkmatter_ext.runtime.inputs import InputError, told
from darkmatter_ext.runtime.storage import atomic_file, parsed_json, require_bounded_archive

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1  # of the file; increased when a reader of the old format would misread the new one
_RECORDED_PACKAGES = ("darkmatter_ext", "torch", "numpy", "transformers", "sae_lens")


HEADLINES = {"l0": "L0", "fvu": "FVU", "fvu_nonlinear": "FVU nonlinear", "linear_share": "linear share"}


def _shown(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def provenance(device: str) -> dict[str, Any]:
    """Where a result was made, and with what."""
    import torch

    from darkmatter_ext.ops.build_info import build_info, package_version

    versions = {name: package_version(name) for name in _RECORDED_PACKAGES}
    on_gpu = device.startswith("cuda")
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": build_info()["commit"],
        "versions": versions | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if on_gpu else device,
        "machine": platform.machine(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True)
class Result:
    """What an experiment returns and figures read."""

    experiment: str
    config: dict[str, Any]
    numbers: dict[str, float]
    series: dict[str, Any] = field(default_factory=dict)  # JSON lists and dicts, for figures
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # per-token columns, in an .npz file beside the JSON
    notes: list[str] = field(default_factory=list)  # what a reader must know to trust the numbers
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.config["seed"]

    def _repr_html_(self) -> str:
        """The headline numbers and the notes, for notebooks; `dm.page` shows all."""
        names = [sae["name"] for sae in self.series.get("saes", ())]
        keys = [key for key in HEADLINES if any(f"{name}/{key}" in self.numbers for name in names)]
        rows = [[name, *(_shown(self.numbers.get(f"{name}/{key}")) for key in keys)] for name in names]
        title = f"{self.experiment}: {len(self.numbers)} numbers; dm.page(result) makes the page"
        return html_table(title, ["SAE", *map(HEADLINES.__getitem__, keys)], rows if keys else [], self.notes)

    def save(self, path: str | Path) -> Path:
        """Write as JSON, with an atomic rename. NaN becomes null: it stands for a number that could not be computed.

        Arrays are written first, into `<stem>.npz` beside it; the JSON names that file, so it never names a missing one.
        """
        path = Path(path)
        content = {"format": FORMAT, **asdict(dataclasses.replace(self, arrays={}))}
        content["arrays"] = _save_arrays(self.arrays, path.with_suffix(".npz"))
        with atomic_file(path) as part:
            part.write_text(json.dumps(_without_nan(content), indent=1, allow_nan=False))
        return path


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return value


def _save_arrays(arrays: dict[str, np.ndarray], path: Path) -> str | None:
    """Write the arrays, compressed, and return the file's name; without arrays, write nothing and return None."""
    import numpy as np

    if not arrays:
        return None
    with atomic_file(path) as part, part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return path.name


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    import numpy as np

    if not path.is_file():
        raise InputError(f"RESULT: must have its per-token arrays beside it, got no file {path}")
    with told("RESULT", "must have its per-token arrays beside it in an .npz file", path):
        require_bounded_archive(path)
        with np.load(path, allow_pickle=False) as file:
            return dict(file)


_KINDS = {
    "experiment": str, "config": dict, "numbers": dict, "series": dict, "notes": list, "seconds": dict, "provenance": dict,
}  # fmt: skip


def _check_kinds(content: dict[str, Any], path: Path) -> None:
    """Raise InputError unless a result's fields have the right types, and its numbers are numbers."""
    for name, kind in _KINDS.items():
        value = content.get(name, kind())
        if not isinstance(value, kind):
            raise InputError(f"RESULT: must have {name} as a {kind.__name__}, got {type(value).__name__} in {path}")
    for name, value in content.get("numbers", {}).items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InputError(f"RESULT: must have numbers that are numbers, got {value!r} as {name} in {path}")
    for note in content.get("notes", []):
        if not isinstance(note, str):
            raise InputError(f"RESULT: must have notes that are texts, got {note!r} in {path}")


def load_result(path: str | Path, *, alone: bool = False) -> Result:
    """Read a result file with its arrays. Raises ValueError if one is missing, not a result, or in another format.

    `alone`: a missing array file is not an error; a note says so, and pages and figures leave out what needs it.
    """
    path = Path(path)
    try:
        content = parsed_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"RESULT: must be a result file, got {path} ({error.strerror})") from None
    except ValueError:
        raise InputError(f"RESULT: must be a JSON result file, got {path} (not JSON)") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InputError(f"RESULT: must be a result of format {FORMAT}, got {path}")
    _check_kinds(content, path)
    stored = content.pop("arrays", None)
    if stored is not None and (not isinstance(stored, str) or Path(stored).name != stored):
        raise InputError(f"RESULT: must name a file beside it for its arrays, got {stored!r} in {path}")
    without = alone and stored and not path.with_name(stored).exists()
    arrays = _load_arrays(path.with_name(stored)) if stored and not without else {}
    try:
        result = Result(**content, arrays=arrays)
    except TypeError as error:
        raise InputError(f"RESULT: must be a result file, got {path} ({error})") from None
    numbers = {name: math.nan if number is None else number for name, number in result.numbers.items()}
    result = dataclasses.replace(result, numbers=numbers)
    return _without_arrays(result, str(stored)) if without else result


def _without_arrays(result: Result, stored: str) -> Result:
    """The result as it is for a reader who has only the JSON file."""
    series = {name: value for name, value in result.series.items() if name != "explored"}
    note = f"{stored}, kept beside this result, was not there: what is told of single tokens and latents is left out."
    return dataclasses.replace(result, series=series, notes=[*result.notes, note])
