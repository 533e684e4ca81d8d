"""The Hub's routes, as far as the client uses them; mixed into the test server's request handler."""

from __future__ import annotations

import base64
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tests.hub.state import LFS_BYTES, LFS_SUFFIXES, ApiError, Blob, Bucket, Repo, card_problems, git_id

if TYPE_CHECKING:
    from tests.hub.server import HubServer

USER = "tester"


class Routes:
    """Needs `hub`, `command`, `path` and `headers` of a request. A handler returns JSON or (status, headers, body)."""

    hub: HubServer
    command: str
    path: str
    headers: Any

    # ------------------------------------------------------------------ who may do what

    def _role(self) -> str | None:
        value = self.headers.get("Authorization", "")
        if not value:
            return None
        role = self.hub.tokens.get(value.removeprefix("Bearer "))
        if role is None:
            raise ApiError(401, "Invalid credentials in Authorization header")
        return role

    def _must_write(self) -> None:
        role = self._role()
        if role is None:
            raise ApiError(401, "Invalid username or password.")
        if role != "write":
            raise ApiError(403, "You don't have the rights: this token has no write permission")

    def _repo(self, name: str) -> Repo:
        role = self._role()
        if name in self.hub.renamed:
            target = self.path.replace(name, self.hub.renamed[name], 1)
            raise ApiError(307, "moved", Location=f"{self.hub.url}{target}")
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and role is None):
            raise ApiError(404, "Repository not found", "RepoNotFound")
        return repo

    # ------------------------------------------------------------------ routes

    def route(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        path = path.replace("/api/datasets/", "/api/models/datasets/", 1)  # data sets are repos named datasets/ORG/NAME
        for method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                with self.hub.lock:
                    answer = getattr(self, handler)(*match.groups(), query=query, body=body)
                if isinstance(answer, tuple):
                    return answer
                return 200, {}, json.dumps(answer).encode()
        raise ApiError(404, f"no route for {self.command} {path}")

    def faults(self, query: dict[str, str], body: bytes) -> Any:
        if self.command == "DELETE":
            self.hub.heal()
            return {}
        self.hub.fail(**json.loads(body))
        return {}

    def state(self, query: dict[str, str], body: bytes) -> Any:
        return self.hub.state()

    def whoami(self, query: dict[str, str], body: bytes) -> Any:
        if self._role() is None:
            raise ApiError(401, "Invalid username or password.")
        return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": self._role()}}}

    def validate_yaml(self, query: dict[str, str], body: bytes) -> Any:
        licenses = set(Path(__file__).parents[2].joinpath("launcher/hub/licenses.txt").read_text().split())
        problems = card_problems(json.loads(body)["content"], licenses)
        if problems:
            content = json.dumps({"errors": [{"message": p} for p in problems], "warnings": []}).encode()
            return 400, {"X-Error-Message": "Invalid metadata"}, content
        return {"errors": [], "warnings": []}

    def create_repo(self, query: dict[str, str], body: bytes) -> Any:
        self._must_write()
        raw = json.loads(body)
        name = f"{raw.get('organization') or USER}/{raw['name']}"
        if name in self.hub.repos:
            return 409, {}, json.dumps({"error": "exists", "url": f"{self.hub.url}/{name}"}).encode()
        is_private = raw.get("visibility") == "private" or bool(raw.get("private"))
        repo = self.hub.repos[name] = Repo(name, is_private)
        data = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        blob = Blob(self.hub.store.put(data), len(data), git_id(data), False)
        repo.add_commit(repo.branches, "main", "initial commit", {".gitattributes": blob}, None)
        return {"url": f"{self.hub.url}/{name}", "id": name}

    def info(self, name: str, revision: str | None = None, *, query: dict[str, str], body: bytes) -> Any:
        repo = self._repo(name)
        commit = repo.resolve(revision or "main")
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if query.get("blobs"):
            siblings = [{**s, "size": commit.files[s["rfilename"]].size} for s in siblings]
        return {
            "id": name.removeprefix("datasets/"),
            "modelId": name,
            "sha": commit.oid,
            "private": repo.private,
            "siblings": siblings,
            "tags": [],
        }

    def preupload(self, name: str, revision: str, *, query: dict[str, str], body: bytes) -> Any:
        self._must_write()
        files = self._repo(name).resolve(revision).files
        answer = []
        for entry in json.loads(body)["files"]:
            path, there = entry["path"], files.get(entry["path"])
            is_lfs = path.endswith(LFS_SUFFIXES) or entry["size"] > LFS_BYTES
            oid = None if there is None else there.sha256 if there.is_lfs else there.git_id
            mode = "lfs" if is_lfs else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def lfs_batch(self, name: str, *, query: dict[str, str], body: bytes) -> Any:
        self._must_write()
        self._repo(name)
        objects = []
        for entry in json.loads(body)["objects"]:
            described = {"oid": entry["oid"], "size": entry["size"], "authenticated": True}
            if not self.hub.store.has(entry["oid"]):
                upload = {"href": f"{self.hub.url}/__lfs/{entry['oid']}", "header": {}}
                verify = {"href": f"{self.hub.url}/__lfs-verify", "header": {}}
                described["actions"] = {"upload": upload, "verify": verify}
            objects.append(described)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str, *, query: dict[str, str], body: bytes) -> Any:
        if self.hub.store.put(body) != oid:
            raise ApiError(400, "the content does not match its hash")
        self.hub.uploaded_bytes += len(body)
        return 200, {}, b""

    def lfs_verify(self, query: dict[str, str], body: bytes) -> Any:
        if not self.hub.store.has(json.loads(body)["oid"]):
            raise ApiError(404, "not uploaded")
        return {}

    def xet_token(self, kind: str, name: str, right: str, *, query: dict[str, str], body: bytes) -> Any:
        if right == "write":
            self._must_write()
        if kind == "models":
            self._repo(name)
        url, token, expires = f"local://{self.hub.store.cas_dir}", "xet", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
        return 200, headers, json.dumps({"casUrl": url, "accessToken": token, "exp": expires}).encode()

    def commit(self, name: str, revision: str, *, query: dict[str, str], body: bytes) -> Any:
        self._must_write()
        repo = self._repo(name)
        if self.hub.max_commits_per_hour is not None:
            recent = [c for c in repo.commits.values() if c.time > time.time() - 3600]
            if len(recent) > self.hub.max_commits_per_hour:
                raise ApiError(429, "too many commits this hour", **{"Retry-After": "3600"})
        head = repo.resolve(revision)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head.oid):
            raise ApiError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            self._apply_operation(files, line["key"], line["value"])
        if query.get("create_pr"):
            number = len(repo.pull_requests) + 1
            made = repo.add_commit(repo.pull_requests, f"refs/pr/{number}", header["summary"], files, head.oid)
            url = f"https://huggingface.co/{name}/discussions/{number}"
        else:
            made = repo.add_commit(repo.branches, revision, header["summary"], files, head.oid)
            url = None
        return {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}",
            "pullRequestUrl": url,
        }

    def _apply_operation(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            data = base64.b64decode(value["content"])
            files[path] = Blob(self.hub.store.put(data), len(data), git_id(data), False)
        elif key == "lfsFile":
            if not self.hub.store.has(value["oid"]):
                raise ApiError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = Blob(value["oid"], value["size"], git_id(value["oid"].encode()), True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise ApiError(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            gone = [p for p in files if p.startswith(path.rstrip("/") + "/")]
            if not gone:
                raise ApiError(404, "A file with this name doesn't exist", "EntryNotFound")
            for p in gone:
                del files[p]

    @staticmethod
    def _describe(path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.git_id}
        if blob.is_lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 132}
        return entry

    def tree(self, name: str, revision: str, *, query: dict[str, str], body: bytes) -> Any:
        files = sorted(self._repo(name).resolve(revision).files.items())
        start = int(query.get("cursor", 0))
        page = [self._describe(path, blob) for path, blob in files[start : start + self.hub.page_size]]
        headers = {}
        if start + self.hub.page_size < len(files):
            base = f"{self.hub.url}/api/models/{name}/tree/{revision}"
            url = f"{base}?recursive=true&cursor={start + self.hub.page_size}"
            headers["Link"] = f'<{url}>; rel="next"'
        return 200, headers, json.dumps(page).encode()

    def paths_info(self, name: str, revision: str, *, query: dict[str, str], body: bytes) -> Any:
        files = self._repo(name).resolve(revision).files
        try:
            paths = json.loads(body)["paths"]
        except ValueError:
            paths = parse_qs(body.decode())["paths"]
        return [self._describe(path, files[path]) for path in paths if path in files]

    def refs(self, name: str, *, query: dict[str, str], body: bytes) -> Any:
        repo = self._repo(name)

        def described(names: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"{prefix}{n}", "targetCommit": oid} for n, oid in names.items()]

        answer = {"branches": described(repo.branches, "refs/heads/"), "tags": described(repo.tags, "refs/tags/")}
        return {**answer, "converts": [], "pullRequests": described(repo.pull_requests, "")}

    def commits(self, name: str, revision: str, *, query: dict[str, str], body: bytes) -> Any:
        history = self._repo(name).history(revision)
        date = "2024-01-01T00:00:00.000Z"
        return [
            {"id": c.oid, "title": c.title, "message": "", "authors": [{"user": USER}], "date": date} for c in history
        ]

    def tag(self, name: str, revision: str, *, query: dict[str, str], body: bytes) -> Any:
        self._must_write()
        repo = self._repo(name)
        if self.command == "DELETE":
            if repo.tags.pop(revision, None) is None:
                raise ApiError(404, "no such tag", "RevisionNotFound")
            return {}
        wanted = json.loads(body)["tag"]
        if wanted in repo.tags:
            raise ApiError(409, "Tag reference exists already")
        repo.tags[wanted] = repo.resolve(revision).oid
        return {}

    def branch(self, name: str, branch: str, *, query: dict[str, str], body: bytes) -> Any:
        self._must_write()
        repo = self._repo(name)
        if branch in repo.branches:
            raise ApiError(409, "Reference already exists")
        repo.branches[branch] = repo.resolve(json.loads(body).get("startingPoint", "main")).oid
        return {}

    def squash(self, name: str, branch: str, *, query: dict[str, str], body: bytes) -> Any:
        self._must_write()
        repo = self._repo(name)
        repo.squashes += 1
        files = repo.resolve(branch).files
        repo.add_commit(repo.branches, branch, json.loads(body)["message"], files, None)
        return {}

    def resolve(self, name: str, revision: str, path: str, *, query: dict[str, str], body: bytes) -> Any:
        commit = self._repo(name).resolve(revision)
        blob = commit.files.get(path)
        if blob is None:
            raise ApiError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.sha256 if blob.is_lfs else blob.git_id}"'}
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if self.command == "HEAD":
            return self._head(name, commit.oid, blob, headers)
        data = self.hub.store.read(blob.sha256, blob.size)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start = int(match[1])
            end = int(match[2]) + 1 if match[2] else len(data)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            return 206, headers, data[start:end]
        return 200, headers, data

    def _head(self, name: str, oid: str, blob: Blob, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        headers["X-Linked-Size"] = headers["Content-Length"] = str(blob.size)
        xet_hash = self.hub.store.xet_hashes().get(blob.sha256) if blob.is_lfs else None
        if xet_hash is not None:
            headers["X-Xet-Hash"] = xet_hash
            url = f"{self.hub.url}/api/models/{name}/xet-read-token/{oid}"
            headers["Link"] = f'<{url}>; rel="xet-auth"'
        return 200, headers, b""

    # ------------------------------------------------------------------ buckets

    def _bucket(self, name: str) -> Bucket:
        self._role()
        if name not in self.hub.buckets:
            raise ApiError(404, "Bucket not found", "RepoNotFound")
        return self.hub.buckets[name]

    def bucket(self, name: str, *, query: dict[str, str], body: bytes) -> Any:
        if self.command == "GET":
            bucket = self._bucket(name)
            size = sum(f[1] for f in bucket.files.values())
            return {
                "id": name,
                "private": False,
                "createdAt": "2024-01-01T00:00:00.000Z",
                "size": size,
                "totalFiles": len(bucket.files),
            }
        self._must_write()
        url = {"url": f"{self.hub.url}/buckets/{name}"}
        if name in self.hub.buckets:
            return 409, {}, json.dumps(url).encode()
        self.hub.buckets[name] = Bucket(name)
        return url

    def _describe_in_bucket(self, bucket: Bucket, path: str) -> dict[str, Any]:
        xet_hash, size, _ = bucket.files[path]
        return {"type": "file", "path": path, "size": size, "xetHash": xet_hash, "mtime": "2024-01-01T00:00:00.000Z"}

    def bucket_tree(self, name: str, prefix: str | None = None, *, query: dict[str, str], body: bytes) -> Any:
        bucket = self._bucket(name)
        paths = [p for p in sorted(bucket.files) if prefix is None or p.startswith(prefix)]
        return [self._describe_in_bucket(bucket, p) for p in paths]

    def bucket_paths_info(self, name: str, *, query: dict[str, str], body: bytes) -> Any:
        bucket = self._bucket(name)
        paths = json.loads(body)["paths"]
        self.hub.paths_asked += paths
        return [self._describe_in_bucket(bucket, p) for p in paths if p in bucket.files]

    def bucket_batch(self, name: str, *, query: dict[str, str], body: bytes) -> Any:
        self._must_write()
        bucket = self._bucket(name)
        sizes = self.hub.store.xet_sizes()
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["type"] == "addFile":
                if operation["xetHash"] not in sizes:
                    raise ApiError(422, f"{operation['path']}: unknown Xet hash")
                bucket.files[operation["path"]] = (operation["xetHash"], sizes[operation["xetHash"]], time.time())
            else:
                bucket.files.pop(operation["path"], None)
        return {"success": True, "failed": []}

    def bucket_resolve(self, name: str, path: str, *, query: dict[str, str], body: bytes) -> Any:
        bucket = self._bucket(name)
        if path not in bucket.files:
            raise ApiError(404, "Entry not found", "EntryNotFound")
        xet_hash, size, _ = bucket.files[path]
        url = f"{self.hub.url}/api/buckets/{name}/xet-read-token"
        headers = {"X-Xet-Hash": xet_hash, "X-Linked-Size": str(size), "Link": f'<{url}>; rel="xet-auth"'}
        if self.command == "HEAD":
            return 200, {**headers, "Content-Length": str(size), "ETag": f'"{xet_hash}"'}, b""
        return 200, headers, self.hub.store.read_xet(xet_hash, size)


_REPO = r"((?:datasets/)?[\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST", "DELETE"), "/__faults", "faults"),
    (("GET",), "/__state", "state"),
    (("GET",), "/api/whoami-v2", "whoami"),
    (("POST",), "/api/validate-yaml", "validate_yaml"),
    (("POST",), "/api/repos/create", "create_repo"),
    (("GET",), rf"/api/models/{_REPO}", "info"),
    (("GET",), rf"/api/models/{_REPO}/revision/(.+)", "info"),
    (("POST",), rf"/api/models/{_REPO}/preupload/(.+)", "preupload"),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (("PUT",), r"/__lfs/([0-9a-f]{64})", "lfs_put"),
    (("POST",), r"/__lfs-verify", "lfs_verify"),
    (("GET",), rf"/api/(models|buckets)/{_REPO}/xet-(read|write)-token(?:/.+)?", "xet_token"),
    (("POST",), rf"/api/models/{_REPO}/commit/(.+)", "commit"),
    (("GET",), rf"/api/models/{_REPO}/tree/([^/]+)", "tree"),
    (("POST",), rf"/api/models/{_REPO}/paths-info/(.+)", "paths_info"),
    (("GET",), rf"/api/models/{_REPO}/refs", "refs"),
    (("GET",), rf"/api/models/{_REPO}/commits/(.+)", "commits"),
    (("POST", "DELETE"), rf"/api/models/{_REPO}/tag/(.+)", "tag"),
    (("POST",), rf"/api/models/{_REPO}/branch/(.+)", "branch"),
    (("POST",), rf"/api/models/{_REPO}/super-squash/(.+)", "squash"),
    (("POST", "GET"), rf"/api/buckets/{_REPO}", "bucket"),
    (("GET",), rf"/api/buckets/{_REPO}/tree(?:/(.+))?", "bucket_tree"),
    (("POST",), rf"/api/buckets/{_REPO}/paths-info", "bucket_paths_info"),
    (("POST",), rf"/api/buckets/{_REPO}/batch", "bucket_batch"),
    (("GET", "HEAD"), rf"/buckets/{_REPO}/resolve/(.+)", "bucket_resolve"),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
]
