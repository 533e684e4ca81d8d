"""The commands, files, links and messages of README.md and docs/."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
READING_VERBS = ("checkpoints", "verify", "export", "push", "status", "report")
"""Those that take a run's folder. They are run on a real one by tests/distributed/test_docs.py."""


@dataclass(frozen=True)
class Command:
    """One line of a bash block. `words`: from `launcher` or `accelerate` on, without variables before it."""

    page: str
    text: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"

    @property
    def verb(self) -> str:
        return self.words[1] if self.words[0] == "launcher" else ""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> list[Command]:
    """Of all bash blocks, and `launcher train …` in running text where it is a whole command."""
    found = []
    for page in PAGES:
        lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
        if page.name != "decisions.md":  # it tells of commands that were tried
            text = page.read_text(encoding="utf-8")
            lines += re.findall(r"`((?:HF_HUB_OFFLINE=1 )?launcher train [^`…]*=[^`…]*)`", text)
        for line in lines:
            words = shlex.split(line, comments=True)
            while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] == "srun"):
                words = words[1:] if words[0] != "srun" else words[words.index("launcher") :]
            if words and not any(re.fullmatch(r"(FOLDER|RUN|KEY)\b.*", word) for word in words):
                found.append(Command(page.name, " ".join(line.split()), tuple(words)))
    return list(dict.fromkeys(found))


def files() -> dict[str, str]:
    """Files that pages show, by the path in their first line."""
    found = {}
    for page in PAGES:
        for block in [*blocks(page, "yaml"), *blocks(page, "python")]:
            if name := re.match(r"# ([\w/]+\.(?:yaml|py))\b|# @package _global_\n# ([\w/]+\.yaml)", block):
                found[f"{page.stem}:{name[1] or name[2]}"] = block
    return found


def write_files(folder: Path, page: str) -> None:
    """What the commands of a page expect to find."""
    roles = ({"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"})
    rows = [json.dumps({"messages": roles}) + "\n"] * 40
    (folder / "chat.jsonl").write_text("".join(rows), encoding="utf-8")
    for name, text in files().items():
        if name.partition(":")[0] in (Path(page).stem, "README"):
            target = folder / name.partition(":")[2]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
