"""What a run has logged, as trainer_state.json holds it: kept as text, since it may be a hundred thousand lines."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from launcher.base.files import parse_json

_BEFORE, _BETWEEN, _AFTER = '\n "log_history": [\n  ', ",\n  ", "\n ]\n}\n"
_EVALUATION = "eval_loss"


class LogHistory:
    """Lines are encoded once, and those of earlier starts are written again as they were read."""

    def __init__(self, lines: Iterable[dict[str, Any]] = ()) -> None:
        self._texts: list[str] = []  # the first may be many lines
        self.evaluations: list[dict[str, Any]] = []
        """The lines of evaluations, in their order."""
        for line in lines:
            self.append(line)

    def append(self, line: dict[str, Any]) -> None:
        self._texts.append(json.dumps(line))
        if _is_evaluation(line):
            self.evaluations.append(line)

    def written_with(self, state: dict[str, Any]) -> str:
        """The content of a trainer_state.json: this history and everything else."""
        head = json.dumps(state, indent=1).removesuffix("\n}")
        return f"{head},{_BEFORE}{_BETWEEN.join(self._texts)}{_AFTER}"

    @classmethod
    def read(cls, text: str) -> LogHistory:
        """From the content of a trainer_state.json, whoever wrote it. Of ours, the evaluations alone are parsed.

        Raises:
            ValueError: it holds no history.
        """
        with contextlib.suppress(ValueError):
            return cls._read_ours(text)
        state = parse_json(text)
        found = state.get("log_history", []) if isinstance(state, dict) else None
        if not isinstance(found, list) or not all(isinstance(line, dict) for line in found):
            raise ValueError("its history is no list of what was logged")
        return cls(found)

    @classmethod
    def _read_ours(cls, text: str) -> LogHistory:
        lines = text.partition(_BEFORE)[2].removesuffix(_AFTER)
        is_cut = lines[:1] == "{" and lines[-1:] == "}" and text.endswith(_AFTER)
        if not is_cut or lines.count("\n") != lines.count("}" + _BETWEEN + "{"):
            raise ValueError("not as `written_with` writes it")
        history = cls()
        history._texts = [lines]
        history.evaluations = list(_evaluations(lines))
        return history


def _is_evaluation(line: dict[str, Any]) -> bool:
    return _EVALUATION in line and isinstance(line.get("step"), int)


def _evaluations(lines: str) -> Iterator[dict[str, Any]]:
    end, name = 0, json.dumps(_EVALUATION)
    while (at := lines.find(name, end)) >= 0:
        start, end = lines.rfind("\n", 0, at) + 1, lines.find("\n", at)
        end = end if end >= 0 else len(lines)
        line = parse_json(lines[start:end].removesuffix(","))  # begins with a brace and ends with one
        if _is_evaluation(line):
            yield line
