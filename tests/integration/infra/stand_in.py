"""A service of the least kind: ready at once, on its port. Dies at start if STAND_IN_DIES is set."""

import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers everything with 200."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


if os.environ.get("STAND_IN_DIES"):
    sys.exit("the stand-in was told to die")
HTTPServer(("127.0.0.1", int(os.environ["SCRIP_HTTP_PORT"])), Handler).serve_forever()
