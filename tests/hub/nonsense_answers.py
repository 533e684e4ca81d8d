"""A Hub one of whose answers is nonsense, against a download and an upload: `nonsense_answers.py SEED FIRST COUNT DIR`.

Seeded: a case is named by its number. Prints a JSON list of the cases that did not end well or with an error by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from launcher.base import manifest
from launcher.base.errors import LauncherError
from launcher.base.paths import RunPaths
from tests.decoy import Decoy
from tests.faults.mutations import Mutator
from tests.hub.helpers import REPO, hub_environment, make_checkpoint, make_config, prepare_spool
from tests.hub.server import HubServer

_MAX_S = 60.0


def plant(hub: HubServer, mutator: Mutator, source: random.Random) -> str:
    """One odd answer among the next ones; what it is, in words."""
    skip = source.choice((0, 0, 1, 2, 3, 5))
    kind = source.random()
    if kind < 0.6:
        hub.fail("/api/|info/lfs", change=mutator.tree, skip=skip)
        return f"JSON of answer {skip}"
    status = source.choice((200, 200, 200, 201, 204, 206, 226, 304, 400, 402, 406, 413, 416, 418, 451, 500, 511))
    content = mutator.bytes(source.choice((b"", b"null", b"[]", b'{"error": "x"}', b"<html>", b'{"sha": "x"}' * 9)))
    names = ("X-Repo-Commit", "ETag", "X-Linked-Etag", "X-Linked-Size", "Location", "Link", "Content-Type",
             "Content-Encoding", "Content-Range", "Retry-After", "X-Error-Code", "RateLimit", "X-Xet-Hash")  # fmt: skip
    values = ("", "x", "-1", "9" * 30, "../../x", "/", "gzip", "br", "bytes 0-1/2", '<x>; rel="next"', "file:///etc/passwd",
              "http://[", "http://127.0.0.1:1/x", "RepoNotFound", "GatedRepo", '"a"', '"default";r=0;t=1')  # fmt: skip
    headers = {source.choice(names): source.choice(values) for _ in range(source.choice((0, 1, 2)))}
    hub.fail("", status=status, content=content, headers=headers, skip=skip)
    return f"answer {skip} is {status} {headers} {content[:40]!r}"


def download(target: Path) -> None:
    from launcher.hub import fetch_checkpoint

    with contextlib.suppress(LauncherError):
        folder = fetch_checkpoint(f"hf://{REPO}", RunPaths(target))
        assert folder == target / "checkpoint-10" and manifest.verify(folder) == [], "what came is not whole"


def upload(run: Path, hub: HubServer) -> None:
    from launcher.hub.items import checkpoint_item
    from launcher.hub.uploader import Uploader

    spool = prepare_spool(run, make_config(run, hub_strategy="all_checkpoints", save_total_limit=2), timeout_s=1.0)
    for step in (10, 20, 30):
        spool.add(checkpoint_item(step, make_checkpoint(run, step, num_bytes=100)))
    Uploader(spool, spool.read_settings()).run(time.monotonic() + 2.0, until_empty=True)
    hub.heal()
    with contextlib.suppress(LauncherError):
        Uploader(spool, spool.read_settings()).run(time.monotonic() + 20.0, until_empty=True)


def main() -> None:
    seed, first, count, root = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    failed: list[dict[str, Any]] = []
    decoy = Decoy(root / "decoy")
    with HubServer(root / "server") as hub:
        os.environ |= hub_environment(hub.url, root / "home", xet=False)
        made = make_checkpoint(root / "made", 10, num_bytes=100)
        inner = {p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*") if p.is_file()}
        for number in range(first, first + count):
            source = random.Random(f"{seed}-{number}")
            mutator = Mutator(f"{seed}-{number}", decoy.root / "a")
            hub.repos.clear()
            hub.heal()
            is_download = source.random() < 0.5
            if is_download or source.random() < 0.5:
                hub.add_repo(REPO, {f"last-checkpoint/{name}": data for name, data in inner.items()})
            what = plant(hub, mutator, source)
            run, began = root / "run", time.monotonic()
            try:
                download(run) if is_download else upload(run, hub)
                assert not decoy.disturbed(), "something outside was touched"
                assert time.monotonic() - began < _MAX_S, "it took too long"
            except BaseException:
                failed.append({"case": f"{seed}-{number}", "what": what, "is_download": is_download,
                               "error": traceback.format_exc()})  # fmt: skip
            shutil.rmtree(run, ignore_errors=True)
    print(json.dumps(failed, indent=1))


if __name__ == "__main__":
    main()
