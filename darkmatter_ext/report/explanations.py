"""Explanations of latents for the page: from a file, or from an experiment that made and judged them.

A file belongs to one SAE:

    {"650": "dates", "651": {"explanation": "names of rivers", "score": 0.83}}

or is a Neuronpedia export: objects with `index` and `description`, as a list or one per line, optionally `.gz`. If a latent
has several explanations, the first is kept.
"""

from __future__ import annotations

import dataclasses
import gzip
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from darkmatter_ext.report.result import Result
from darkmatter_ext.runtime.inputs import InputError, told
from darkmatter_ext.runtime.storage import most_unpacked, parsed_json, require_bounded


class Explanation(NamedTuple):
    """What is said about a latent."""

    text: str
    score: float | None = None  # how well it separates texts, by its maker's scoring


def with_explanations(result: Result, sae: str, found: Mapping[int, Explanation], by: str) -> Result:
    """The result with explanations, made by `by`, of the latents it keeps for the SAE named `sae`."""
    about = result.series["explored"]
    saes = [dict(entry) for entry in about["saes"]]
    number, entry = next((place, entry) for place, entry in enumerate(saes) if entry["name"] == sae)
    kept = result.arrays[f"page/sae{number}/latent/number"].tolist()
    own = {str(latent): list(found[latent]) for latent in kept if latent in found}
    entry |= {"explanations": entry.get("explanations", {}) | own, "explained_by": by}
    return dataclasses.replace(result, series=result.series | {"explored": about | {"saes": saes}})


def explained_results(results: Sequence[Result], specs: Sequence[str]) -> list[Result]:
    """The results with explanations from files, each given as `FILE` or, if there are several SAEs, `SAE=FILE`.

    Raises InputError for a file without explanations or for other latents, or if it is unclear which SAE is meant.
    """
    changed = list(results)
    for spec in specs:
        sae, path = _meant(changed, spec)
        places = [place for place, result in enumerate(changed) if sae in _explored(result)]
        folders = {_explored(changed[place])[sae]["folder"] for place in places}
        if len(folders) > 1:
            raise InputError(
                f"explanations: must be of one SAE, got {sae}, which is another in each of {len(folders)} results"
            )
        found = read_explanations(path, sae, _explored(changed[places[0]])[sae]["d_sae"])
        for place in places:
            changed[place] = with_explanations(changed[place], sae, found, path.name)
    return changed


def _explored(result: Result) -> dict[str, dict[str, Any]]:
    """The result's SAEs whose latents a page shows, by name."""
    return {sae["name"]: sae for sae in result.series.get("explored", {}).get("saes", ())}


def _meant(results: Sequence[Result], spec: str) -> tuple[str, Path]:
    """The SAE and the file that `SAE=FILE` or `FILE` means."""
    names = list(dict.fromkeys(name for result in results for name in _explored(result)))
    if not names:
        raise InputError(
            f"explanations: must come with a result that keeps latents (page_megabytes), got {spec} with none"
        )
    for name in names:
        if spec.startswith(f"{name}="):
            return name, Path(spec.removeprefix(f"{name}="))
    if len(names) > 1:
        raise InputError(f"explanations: must be SAE=FILE with SAE one of {', '.join(names)}, got {spec}")
    return names[0], Path(spec)


def read_explanations(path: Path, sae: str, d_sae: int) -> dict[int, Explanation]:
    """Latent -> explanation. Raises InputError, one line, for a file in another format or for other latents."""
    found: dict[int, Explanation] = {}
    for latent, given in _entries(path):
        try:
            number = int(latent)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < d_sae or isinstance(latent, bool | float):
            raise InputError(f"explanations: must be of latents 0 to {d_sae - 1} of {sae}, got {latent!r} in {path}")
        found.setdefault(number, _explanation(given, number, path))
    return found


def _entries(path: Path) -> Iterable[tuple[Any, Any]]:
    """Pairs (latent, what is said about it), as they are in a file."""
    try:
        text = (_unpacked(path) if path.suffix == ".gz" else path.read_bytes()).decode()
    except (OSError, zlib.error) as error:
        why = getattr(error, "strerror", None) or "not gzip"
        raise InputError(f"explanations: must be a file, got {path} ({why})") from None
    except (EOFError, UnicodeDecodeError):
        raise InputError(f"explanations: must be UTF-8 text, got {path}") from None
    try:
        found = parsed_json(text)
    except ValueError:
        found = _lines(text, path)
    if isinstance(found, dict) and not {"index", "description"} <= set(found):
        return found.items()
    rows = found if isinstance(found, list) else [found]
    if all(isinstance(row, dict) and "index" in row and "description" in row for row in rows):
        return [(row["index"], row["description"]) for row in rows]
    raise InputError(
        f"explanations: must be an object of latents, or objects with index and description, got other JSON in {path}"
    )


def _unpacked(path: Path) -> bytes:
    """The contents of a gzip file, read no further than `require_bounded` allows."""
    packed = path.stat().st_size
    with gzip.open(path) as file:
        content = file.read(most_unpacked(packed) + 1)
    with told("explanations", "must be a gzip file of texts", path):
        require_bounded(path, len(content), packed)
    return content


def _lines(text: str, path: Path) -> list[Any]:
    try:
        return [parsed_json(line) for line in text.splitlines() if line.strip()]
    except ValueError:
        raise InputError(f"explanations: must be JSON, got {path}") from None


def _explanation(given: Any, latent: int, path: Path) -> Explanation:
    if isinstance(given, str):
        return Explanation(given)
    if isinstance(given, dict) and set(given) <= {"explanation", "score"} and isinstance(given.get("explanation"), str):
        score = given.get("score")
        if score is None or (isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)):
            return Explanation(given["explanation"], None if score is None else float(score))
    raise InputError(
        f"explanations: must give latent {latent} a text, or explanation and a finite score, got {given!r} in {path}"
    )
