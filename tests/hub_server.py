"""A small server on 127.0.0.1 that speaks the hub's protocol, and can misbehave.

What `huggingface_hub` asks for: /api/models/ID/revision/REV for the commit,
/api/models/ID/tree/COMMIT for the files, and HEAD and GET of /ID/resolve/COMMIT/FILE
with ETag, X-Repo-Commit, Content-Length and Range.
"""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(ThreadingHTTPServer):
    """Serves `repositories`, {id: {revision: {file: bytes}}}, and logs requests."""

    daemon_threads = True

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.log = []
        self.cuts = 0  # how many of the next downloads break off halfway
        self.extra = 0  # bytes by which the announced size of weights is wrong
        self.gated = set()  # repositories that answer with the refusal
        self.refusal = 401, "GatedRepo"

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.server.log.append((self.command, self.path, self.headers.get("Range")))
        path = self.path.split("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not (match := api or file):
            return self.fail(404, "EntryNotFound")
        name, revision = match[1], match[3] if api else match[2]
        if name in self.server.gated:
            return self.fail(*self.server.refusal)
        if name not in self.server.repositories:
            return self.fail(401, "RepoNotFound")  # the hub hides what is private
        names = {commit: name for name, commit in COMMITS.items()}
        revision = names.get(revision, revision)
        if revision not in self.server.repositories[name]:
            return self.fail(404, "RevisionNotFound")
        files = self.server.repositories[name][revision]
        if file and file[3] not in files:
            return self.fail(404, "EntryNotFound")
        if file:
            return self.send_file(files[file[3]], COMMITS[revision], body, file[3])
        if api[2] == "revision":
            about = {"id": name, "sha": COMMITS[revision]}
            about["siblings"] = [{"rfilename": f} for f in files]
        else:
            about = [
                {"type": "file", "path": f, "size": len(data), "oid": etag(data)}
                for f, data in files.items()
            ]
        self.send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def send_file(self, data, commit, body, name):
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": commit}
        size = len(data)
        if name.endswith(".safetensors") and not body:
            size += self.server.extra
        start = 0
        if asked := self.headers.get("Range"):
            start = int(re.match(r"bytes=(\d+)-", asked)[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if body and name.endswith(".safetensors") and self.server.cuts:
            self.server.cuts -= 1
            headers["Content-Length"] = str(size - start)
            self.send(206 if asked else 200, data[start : (start + size) // 2], headers)
            self.close_connection = True
            return
        headers["Content-Length"] = str(size - start)
        self.send(206 if asked else 200, data[start:] if body else b"", headers)

    def send(self, status, data, headers):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def fail(self, status, code):
        self.send(status, b"", {"X-Error-Code": code} if code else {})


def etag(data):
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serve(repositories):
    """A running `Hub`, stopped at the end."""
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(5)
