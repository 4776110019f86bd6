"""A stand-in for the Hugging Face hub: what an upload asks of it, over HTTP."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants


class Hub:
    """What the stand-in has been asked.

    Attributes:
        created: Bodies of the requests for new repositories.
        files: Contents of uploaded files by "repository/path".
        forbidden: Names of repositories that may not be written to.
    """

    def __init__(self):
        self.created, self.files, self.forbidden = [], {}, ()
        self.url = ""

    def reply(self, path, body):
        """Status and JSON of the answer to a request."""
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            name = "/".join(filter(None, map(self.created[-1].get, ("organization", "name"))))
            return 200, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name, _, call = path.removeprefix("/api/models/").partition("/auth-check")
        if call:
            return (403 if name in self.forbidden else 200), {}
        name, _, call = path.removeprefix("/api/models/").partition("/preupload/")
        if call:
            names = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": path, **regular} for path in names]}
        name, _, call = path.removeprefix("/api/models/").partition("/commit/")
        if call:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[f"{name}/{line['value']['path']}"] = content
            return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1"}
        return 404, {}


@contextlib.contextmanager
def hub_server(monkeypatch):
    """Runs the stand-in in the hub's place."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            size = int(self.headers.get("Content-Length") or 0)
            status, answer = hub.reply(self.path.partition("?")[0], self.rfile.read(size))
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
