"""The other arm of the benchmark: the same server under plain runc and CRIU, with images in a folder.

The container is made like Rewarm's: overlay over `/`, a network namespace made beforehand, `/dev/shm` in a folder, stdio to
/dev/null. Mounts belong to the mount namespace of the benchmark and go with it.
"""

import ctypes
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import threading
import time

CLONE_NEWNET = 0x40000000
STATS_MAGIC = 0x55105940
CAPABILITIES = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE")
libc = ctypes.CDLL(None, use_errno=True)


def run(*command, **options):
    subprocess.run([str(word) for word in command], check=True, **options)


def mute(*command, **options):
    """For runc: a container inherits these, and CRIU dumps none that is a file of the host."""
    null = subprocess.DEVNULL
    run(*command, stdin=null, stdout=null, stderr=null, **options)


def in_namespace(path, function):
    """Calls `function` in a thread that has entered a network namespace."""
    result = []

    def enter():
        with open(path) as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                result.append(OSError(ctypes.get_errno(), f"setns {path}"))
                return
        try:
            result.append(function())
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def varints(data):
    """Field number and value of each varint of a protobuf message; nested messages as bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        value = varint()
        if key & 7 == 2:
            yield key >> 3, data[at : at + value]
            at += value
        else:
            yield key >> 3, value


def frozen_seconds(stats):
    """CRIU's own account of how long the tasks were frozen."""
    data = stats.read_bytes()
    first, _, length = struct.unpack_from("<III", data)
    if first != STATS_MAGIC:
        raise ValueError(f"{stats}: begins with {first:#x}, expected {STATS_MAGIC:#x}")
    dump = dict(varints(data[12 : 12 + length]))[1]
    return dict(varints(dump))[2] / 1e6


class Stock:
    """One server under runc. `criu` is the folder of the CRIU program, the same that Rewarm uses; `images` lies elsewhere
    than in `folder` where several servers are restored from the same ones, or where it is memory."""

    def __init__(self, folder, name, command, criu, images=None):
        self.folder, self.name = pathlib.Path(folder), name
        self.images = images or self.folder / "images"
        self.namespace = f"/run/netns/{name}"
        self.runc = ["runc", "--root", str(self.folder / "runc")]
        self.environment = {**os.environ, "PATH": f"{criu}:{os.environ['PATH']}"}
        for part in ("upper", "work", "root", "bundle", "shm", "runc"):
            (self.folder / part).mkdir(parents=True)
        layers = f"lowerdir=/,upperdir={self.folder}/upper,workdir={self.folder}/work"
        run("mount", "-t", "overlay", "overlay", "-o", layers, self.folder / "root")
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "set", "lo", "up")
        run("runc", "spec", cwd=self.folder / "bundle")
        self.write_bundle(command)

    def write_bundle(self, command):
        path = self.folder / "bundle/config.json"
        config = json.loads(path.read_text())
        config["root"] = {"path": str(self.folder / "root"), "readonly": False}
        config["process"] |= {"terminal": False, "args": [str(word) for word in command], "cwd": "/"}
        config["process"].pop("rlimits", None)
        config["process"]["capabilities"] = dict.fromkeys(config["process"]["capabilities"], CAPABILITIES)
        for namespace in config["linux"]["namespaces"]:
            if namespace["type"] == "network":
                namespace["path"] = self.namespace
        shm = {"destination": "/dev/shm", "type": "bind", "source": str(self.folder / "shm"), "options": ["rbind", "rw"]}
        config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] != "/dev/shm"] + [shm]
        criu = self.folder / "criu.conf"
        # As with Rewarm: without the last, a connection that was not accepted yet fails the dump of a server under load.
        criu.write_text("network-lock skip\nghost-limit 1G\nmanage-cgroups=ignore\nskip-in-flight\n")
        config["annotations"] = {"org.criu.config": str(criu)}
        path.write_text(json.dumps(config))

    def start(self):
        mute(*self.runc, "run", "-d", "--bundle", self.folder / "bundle", self.name, env=self.environment)

    def connect(self, port):
        """A connection to the server, made inside its network namespace; retried until there is one."""
        while True:
            try:
                return in_namespace(self.namespace, lambda: socket.create_connection(("127.0.0.1", port), timeout=60))
            except ConnectionRefusedError:
                time.sleep(0.001)

    def dump(self):
        """`runc checkpoint`, then tar and zstd; the server goes on. Gives seconds of all and of the freeze, and bytes."""
        images, work, archive = self.images, self.folder / "dump", self.folder / "archive"
        for folder in (images, work):
            shutil.rmtree(folder, ignore_errors=True)
        began = time.monotonic()
        mute(
            *(*self.runc, "checkpoint", "--leave-running", "--image-path", images, "--work-path", work),
            *("--tcp-established", "--file-locks", self.name),
            env=self.environment,
        )
        run("sh", "-c", 'tar -C "$0" -c . | zstd -q -f -1 -T0 -o "$1"', images, archive)
        return time.monotonic() - began, frozen_seconds(work / "stats-dump"), archive.stat().st_size

    def end(self):
        mute(*self.runc, "delete", "-f", self.name, env=self.environment)

    def restore(self):
        """Seconds until `runc restore` returns: everything is in memory then."""
        began = time.monotonic()
        mute(
            *(*self.runc, "restore", "-d", "--bundle", self.folder / "bundle", "--image-path", self.images),
            *("--work-path", self.folder / "restore", "--tcp-established", self.name),
            env=self.environment,
        )
        return time.monotonic() - began

    def close(self):
        subprocess.run([*self.runc, "delete", "-f", self.name], env=self.environment, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "netns", "del", self.name], stderr=subprocess.DEVNULL)
        subprocess.run(["umount", "-l", str(self.folder / "root")], stderr=subprocess.DEVNULL)
