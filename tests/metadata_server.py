"""A stand-in for the metadata server of a machine on Google Cloud."""

import contextlib
import http.server
import threading


@contextlib.contextmanager
def metadata_server(answers):
    """A server that gives answers[path], and 404 for what is not there or is asked without Google's header."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/")
            asked.append(name)
            known = name in answers and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(answers[name].encode() if known else b"TERMINATE_ON_HOST_MAINTENANCE")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"localhost:{server.server_port}", asked
        finally:
            server.shutdown()
