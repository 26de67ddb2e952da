"""A Hugging Face hub with one dataset repository on loopback, with the part of its API that HfFileSystem uses.

The API is described at https://huggingface.co/docs/hub/api. All files are "regular" (small), so commits contain their contents.
The real hub stores large files elsewhere.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPOSITORY = "somebody/latents"


class FakeHub(ThreadingHTTPServer):
    """The server.

    Attributes:
        files: contents by path.
        requests: method and path of each request.
    """

    daemon_threads = True

    def __init__(self, host):
        super().__init__((host, 0), Handler)
        self.files, self.requests = {}, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def commit(self):
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": self.server.commit, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def missing(self, code):
        self.answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        found = re.fullmatch(rf"(/api)?/datasets/{REPOSITORY}(?:/(\w+)/(\w+)/?(.*))?", path)
        if found is None or found[3] not in (None, "main", self.server.commit):
            return self.missing("RepoNotFound" if found is None else "RevisionNotFound")
        action = getattr(self, f"{self.command.lower()}_{found[2] or 'revision'}")
        return action(found[4] or "", body)

    do_GET = do_POST = serve

    def get_revision(self, _path, _body):
        siblings = [{"rfilename": name} for name in sorted(self.server.files)]
        self.answer({"id": REPOSITORY, "sha": self.server.commit, "siblings": siblings, "private": False, "tags": []})

    def get_tree(self, folder, _body):
        start, entries = f"{folder}/" if folder else "", {}
        for name, content in sorted(self.server.files.items()):
            if name.startswith(start):
                first, _, below = name[len(start) :].partition("/")
                file = {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
                entries[start + first] = {"type": "directory", "oid": "0", "size": 0} if below else file
        if folder and not entries:
            return self.missing("EntryNotFound")
        return self.answer([{"path": name, **entry} for name, entry in entries.items()])

    def get_resolve(self, name, _body):
        content = self.server.files.get(name)
        if content is None:
            return self.missing("EntryNotFound")
        etag, wanted = (
            f'"{hashlib.sha1(content).hexdigest()}"',
            re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")),
        )
        if wanted is None:
            return self.answer(content, ETag=etag, Accept_Ranges="bytes")
        start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        return self.answer(content[start:stop], 206, ETag=etag, Content_Range=f"bytes {start}-{stop - 1}/{len(content)}")

    def post_preupload(self, _path, body):
        names = [each["path"] for each in json.loads(body)["files"]]
        self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})

    def post_commit(self, _path, body):
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del self.server.files[line["value"]["path"]]
        commit = self.server.commit
        url = f"https://huggingface.co/datasets/{REPOSITORY}/commit/{commit}"
        self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
