"""A small server that speaks OpenAI's chat completions, on this computer."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-a-key-for-tests-only"


class ChatServer:
    """`answers`: what it says, one after the other, then the last again; `status` and `delay` hold
    for all. `seen`: (headers, body) of each request."""

    def __init__(self):
        self.reset()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((dict(self.headers), body, self.path))
                time.sleep(outer.delay)
                data = outer.reply(len(outer.seen) - 1)
                self.send_response(outer.status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def reset(self):
        self.answers, self.status, self.delay, self.headers = ["A long prompt."], 200, 0.0, {}
        self.seen, self.raw, self.finish = [], None, "stop"

    def reply(self, number: int) -> bytes:
        if self.raw is not None:
            return self.raw
        text = self.answers[min(number, len(self.answers) - 1)]
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        return json.dumps({"choices": [choice]}).encode()

    def environ(self, **more) -> dict[str, str]:
        """An environment that leads to it."""
        names = {"address": self.url, "model": "toy", "key": KEY, "sees": "1", "settings": ""}
        return {f"FLUX2KIT_CHAT_{name.upper()}": value for name, value in (names | more).items()}

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
