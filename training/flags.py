"""A run's own config.json as the flags that make the run again."""

import json
from pathlib import Path
from typing import Any

from model.edge import quoted

# Where a run was and how it came to an end, not what it is.
_OF_ONE_RUN = {"out", "resume", "override", "cooldown", "explain", "config"}


def from_config(path: str) -> list[str]:
    """The flags of `train.py` that a config.json stands for; later ones on the line overrule them.

    Args:
        path: The file, or the run folder that holds it.

    Raises:
        OSError: it cannot be read.
        ValueError: no run wrote it.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        recipe, flags = dict(values["recipe"]), dict(values["flags"])
        chosen = {**flags, **flags.pop("choices", {}), **recipe, "preset": recipe.pop("name")}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"config: {file} must be the config.json of a run, with its recipe and flags"
        ) from None
    left_out = _OF_ONE_RUN | {"choices", "name"}
    left_out |= {"model"} if chosen.get("init") else set()  # whose weights decide it
    left_out |= {"max_steps"} if chosen.get("epochs") else set()  # of that text
    return [word for name, value in chosen.items() if name not in left_out
            for word in _spelled(file, name, value)]  # fmt: skip


def _spelled(file: Path, name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if value is None or value == []:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return [f"--{flag}", *value]
    if not isinstance(value, str | int | float):
        raise ValueError(f"config: {file}: {name} must be a plain value, got {quoted(value)}")
    return [f"--{flag}={value}"]
