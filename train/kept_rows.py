"""The rows of a score table that are done, in a file: scoring goes on where it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asd_rt.errors import ConfigError
from asd_rt.files import replacing
from asd_rt.plan import FixedPlan
from train.evaluation import Row
from train.scores import Scores


class KeptRows:
    """A file of rows, which hold only for what it is marked with."""

    def __init__(self, path: Path, mark: str) -> None:
        """Take up the rows in `path`, where there are some of the same `mark`.

        Args:
            path: of the file; it need not exist.
            mark: of all that the rows depend on.

        Raises:
            ConfigError: the file cannot be read.
        """
        self._path, self._mark = path, mark
        self._rows: dict[str, Row] = {}
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            if found["mark"] == mark:
                self._rows = {name: _row(values) for name, values in found["rows"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path}: holds no rows of scores ({error}); remove it to score again"
            ) from error

    def row(self, name: str, make: Callable[[], Row]) -> tuple[Row, bool]:
        """The row kept as `name`, else what `make` returns, which is kept; and whether it was there."""
        if name in self._rows:
            return self._rows[name], True
        self._rows[name] = make()
        rows = {name: asdict(row) for name, row in self._rows.items()}
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps({"mark": self._mark, "rows": rows}) + "\n")
        return self._rows[name], False


def _row(values: dict[str, Any]) -> Row:
    plan = values["plan"] and FixedPlan(**values["plan"])
    return Row(**values | {"plan": plan, "scores": Scores(**values["scores"])})
