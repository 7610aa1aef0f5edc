"""A small Hub on loopback, for HF_ENDPOINT: serves folders the way huggingface.co does, and fails the way networks do.

The owner in `owner/name` says how: "fine" answers, those of `FAULTS` fail as they are called.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

FAULTS = ("gone", "gated", "forbidden", "broken", "cut")  # owners; "cut" breaks off in the large files
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = words[0] == "api"
        words = words[1:] if is_api else words
        kind = words.pop(0) if words[0] in ("datasets", "models") else "models"
        owner, name, what, *rest = [*words, "", "", ""][: max(3, len(words))]
        folder = self.server.repositories.get((kind, name))
        if owner == "broken":
            self.refuse(500)
        elif owner == "gated":
            self.refuse(403, "GatedRepo")
        elif owner == "forbidden":
            self.refuse(403)
        elif owner == "gone" or folder is None:
            self.refuse(404, "RepoNotFound")
        elif not is_api:
            path = folder.joinpath(*rest[1:])  # resolve/REVISION/PATH
            if path.is_file():
                self.send_file(path, owner == "cut" and path.suffix in (".safetensors", ".jsonl"))
            else:
                self.refuse(404, "EntryNotFound")
        elif what == "tree":
            within = "/".join(rest[1:])  # tree/REVISION/FOLDER
            if folder.joinpath(within).is_dir():
                self.send_json([entry for entry in entries(folder) if entry["path"].startswith(within)])
            else:
                self.refuse(404, "EntryNotFound")
        elif what == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            self.send_json([entry for entry in entries(folder) if entry["path"] in wanted])
        else:
            files = [{"rfilename": entry["path"]} for entry in entries(folder)]
            self.send_json({"_id": "0", "id": f"{owner}/{name}", "sha": COMMIT, "siblings": files, "tags": []})

    def send_file(self, path: Path, breaks_off: bool) -> None:
        data = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[start : len(data) // 2] if breaks_off else data[start:])
            self.close_connection = breaks_off

    def send_json(self, content) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, code: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args) -> None:
        pass


def entries(folder: Path) -> list[dict]:
    """A repository's files, as its tree lists them."""
    return [
        {
            "type": "file",
            "path": str(path.relative_to(folder)),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


@contextmanager
def serving(**repositories: Path):
    """The address of a Hub that has these repositories, `models_NAME` or `datasets_NAME`, under every owner."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.repositories = {tuple(key.split("_", 1)): folder for key, folder in repositories.items()}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
