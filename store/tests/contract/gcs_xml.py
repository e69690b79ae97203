"""The XML interface of Google Cloud Storage over the storage of gcp-storage-emulator.

The emulator serves the JSON interface; the object_store library speaks XML. Each request here becomes one of the
emulator's own calls; multipart uploads are composed by it as well. Arguments: port, bucket.
"""

import hashlib
import re
import sys
import threading
import uuid
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.handlers.objects import _checksums, _make_object_resource
from gcp_storage_emulator.storage import Storage

STORAGE = Storage(use_memory_fs=True)
LOCK = threading.Lock()
PARTS = {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def respond(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        with LOCK:
            try:
                if not key:
                    self.list_objects(bucket, query.get("prefix", ""))
                else:
                    self.object_request(bucket, key, query, body)
            except NotFound:
                self.respond(404, b"<Error><Code>NoSuchKey</Code></Error>")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

    def list_objects(self, bucket, prefix):
        objects, _ = STORAGE.get_file_list(bucket, prefix)
        found = "".join(
            f"<Contents><Key>{escape(o['name'])}</Key><Size>{o['size']}</Size>"
            f"<LastModified>{o['updated']}</LastModified><ETag>{o['generation']}</ETag></Contents>"
            for o in objects
        )
        self.respond(200, f"<ListBucketResult>{found}</ListBucketResult>".encode())

    def object_request(self, bucket, key, query, body):
        if self.command in ("GET", "HEAD"):
            self.read(bucket, key)
        elif self.command == "POST" and "uploads" in query:
            upload = uuid.uuid4().hex
            PARTS[upload] = {}
            xml = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            self.respond(200, xml.encode())
        elif self.command == "PUT" and "uploadId" in query:
            PARTS[query["uploadId"]][int(query["partNumber"])] = body
            self.respond(200, headers=[("ETag", hashlib.md5(body).hexdigest())])
        elif self.command == "POST":
            parts = PARTS.pop(query["uploadId"])
            wanted = [int(n) for n in re.findall(rb"<PartNumber>(\d+)</PartNumber>", body)]
            generation = self.write(bucket, key, b"".join(parts[n] for n in wanted))
            xml = f"<CompleteMultipartUploadResult><ETag>{generation}</ETag></CompleteMultipartUploadResult>"
            self.respond(200, xml.encode(), [("x-goog-generation", generation)])
        elif self.command == "DELETE" and "uploadId" in query:
            PARTS.pop(query["uploadId"], None)
            self.respond(204)
        elif self.command == "DELETE":
            STORAGE.delete_file(bucket, key)
            self.respond(204)
        elif self.headers.get("x-goog-if-generation-match") == "0" and self.exists(bucket, key):
            self.respond(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        else:
            generation = self.write(bucket, key, body)
            self.respond(200, headers=[("ETag", generation), ("x-goog-generation", generation)])

    def exists(self, bucket, key):
        try:
            STORAGE.get_file_obj(bucket, key)
            return True
        except NotFound:
            return False

    def write(self, bucket, key, body):
        base = "http://{}".format(self.headers.get("Host"))
        resource = _make_object_resource(base, bucket, key, "application/octet-stream", str(len(body)))
        STORAGE.create_file(bucket, key, body, _checksums(body, resource))
        return resource["generation"]

    def read(self, bucket, key):
        resource = STORAGE.get_file_obj(bucket, key)
        size = int(resource["size"])
        headers = [
            ("ETag", resource["generation"]),
            ("x-goog-generation", resource["generation"]),
            ("Last-Modified", formatdate(int(resource["generation"]) / 1e9, usegmt=True)),
        ]
        if self.command == "HEAD":
            self.respond(200, headers=[*headers, ("Content-Length", str(size))])
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        body = STORAGE.get_file(bucket, key)
        if wanted is None:
            self.respond(200, body, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2]), size - 1)
        if first >= size:
            self.respond(416, headers=[("Content-Range", f"bytes */{size}")])
            return
        headers.append(("Content-Range", f"bytes {first}-{last}/{size}"))
        self.respond(206, body[first : last + 1], headers)

    def log_message(self, *_):
        pass


buckets.create_bucket(sys.argv[2], STORAGE)
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
