"""Puts and gets large values in Redis and in Mooncake's TCP store on this machine, to stand beside `longshore bench store`.

Redis: `redis-server` and `redis-benchmark` (Debian: redis-server), no persistence, over loopback. Mooncake: the package
mooncake-transfer-engine-non-cuda in the Python that --python names; a master, a process that holds the memory, and this client over
protocol tcp with registered buffers, in batches. What is not installed is left out and named. The figures are GB/s of values and
cores used by all processes of the peer together, as Markdown and JSON.
"""

import argparse
import ctypes
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

BATCH = 8
HELD_BYTES = 512 << 20


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--value-bytes", default="262144,1048576", help="sizes, separated by commas [%(default)s]")
    add("--clients", default="1,4", help="connections of redis-benchmark, separated by commas [%(default)s]")
    add("--seconds", type=float, default=2.0, help="seconds of each point, about [%(default)s]")
    add("--redis", default=shutil.which("redis-server") or "", help="redis-server; its redis-benchmark lies beside it [%(default)s]")
    add("--python", default=sys.executable, help="Python that has Mooncake [%(default)s]")
    add("--json", metavar="FILE", help="write all figures as JSON")
    add("--worker", choices=["hold", "measure"], help=argparse.SUPPRESS)
    add("--master", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def await_port(port, process, patience=20):
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"{process.args[0]} ended with {process.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"{process.args[0]} does not listen on port {port}")


def cpu_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def point(peer, operation, value_bytes, clients, gbps, cores):
    return {
        "peer": peer,
        "operation": operation,
        "value_bytes": value_bytes,
        "clients": clients,
        "gbps": gbps,
        "cores_per_gbps": cores / gbps if gbps else 0.0,
    }


def redis(options, sizes, clients):
    server = options.redis
    if not server or not os.path.exists(server):
        print("Redis is left out: no redis-server; hint: apt-get install redis-server", file=sys.stderr)
        return []
    client = pathlib.Path(server).with_name("redis-benchmark")
    points = []
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            await_port(port, process)
            for size in sizes:
                for count in clients:
                    points += redis_points(client, port, process.pid, size, count, options.seconds)
        finally:
            process.terminate()
            process.wait()
    return points


def redis_points(client, port, server_pid, size, clients, seconds):
    points = []
    for operation in ["set", "get"]:
        requests = max(200, int(seconds * 1.0e9 / size))
        command = [str(client), "-p", str(port), "-t", operation, "-d", str(size), "-n", str(requests), "-c", str(clients), "-r", "64"]
        before, own = cpu_seconds(server_pid), os.times()
        begun = time.monotonic()
        output = subprocess.run(command + ["--csv"], capture_output=True, text=True, check=True).stdout
        wall, now = time.monotonic() - begun, os.times()
        rate = float(re.search(r'^"%s","([0-9.]+)"' % operation.upper(), output, re.M).group(1))
        used = cpu_seconds(server_pid) - before
        used += now.children_user + now.children_system - own.children_user - own.children_system
        points.append(point("redis", {"set": "put"}.get(operation, operation), size, clients, rate * size / 1e9, used / wall))
    return points


def has_mooncake(python):
    found = subprocess.run([python, "-c", "import mooncake.store"], capture_output=True, text=True)
    if found.returncode != 0:
        why = (found.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"Mooncake is left out: {why}; hint: pip install mooncake-transfer-engine-non-cuda, libibverbs1", file=sys.stderr)
    return found.returncode == 0


def mooncake(options):
    if not has_mooncake(options.python):
        return []
    master = pathlib.Path(options.python).with_name("mooncake_master")
    port, metrics = free_port(), free_port()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    flags = [f"--rpc_port={port}", f"--metrics_port={metrics}"]
    processes = [subprocess.Popen([str(master), *flags], **quiet)]
    try:
        await_port(port, processes[0])
        base = [options.python, __file__, "--master", f"127.0.0.1:{port}", "--value-bytes", options.value_bytes]
        base += ["--seconds", str(options.seconds)]
        holder = subprocess.Popen([*base, "--worker", "hold"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        processes.append(holder)
        for line in holder.stdout:
            if line.startswith("ready"):
                break
        measured = subprocess.run([*base, "--worker", "measure"], capture_output=True, text=True)
        lines = [line for line in measured.stdout.splitlines() if line.startswith('{"peer"')]
        if not lines:
            print(f"Mooncake gave no figures: {measured.stderr[-400:]}", file=sys.stderr)
        return [json.loads(line) for line in lines]
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


def open_store(master, segment_bytes, buffer_bytes):
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, buffer_bytes, "tcp", "", master)
    if code != 0:
        raise SystemExit(f"setup failed with {code}")
    return store


def hold(options):
    store = open_store(options.master, 4 * HELD_BYTES, 16 << 20)
    print("ready", flush=True)
    sys.stdin.read()
    store.close()


def measure(options):
    store = open_store(options.master, 0, 64 << 20)
    for size in map(int, options.value_bytes.split(",")):
        buffer = ctypes.create_string_buffer(b"\x01" * (BATCH * size), BATCH * size)
        address = ctypes.addressof(buffer)
        if store.register_buffer(address, BATCH * size) != 0:
            raise SystemExit("cannot register a buffer")
        places = [address + index * size for index in range(BATCH)]
        sizes = [size] * BATCH
        batches = [[f"{size}-{batch}-{index}" for index in range(BATCH)] for batch in range(HELD_BYTES // (size * BATCH))]
        begun, used = time.monotonic(), time.process_time()
        for keys in batches:
            if any(code != 0 for code in store.batch_put_from(keys, places, sizes)):
                raise SystemExit("a put failed")
        wall, used = time.monotonic() - begun, time.process_time() - used
        print(json.dumps(point("mooncake", "put", size, BATCH, len(batches) * BATCH * size / wall / 1e9, used / wall)), flush=True)
        begun, used, count = time.monotonic(), time.process_time(), 0
        while time.monotonic() < begun + options.seconds:
            for keys in batches:
                if any(code != size for code in store.batch_get_into(keys, places, sizes)):
                    raise SystemExit("a get failed")
                count += BATCH
        wall, used = time.monotonic() - begun, time.process_time() - used
        print(json.dumps(point("mooncake", "get", size, BATCH, count * size / wall / 1e9, used / wall)), flush=True)
        store.remove_all()
        store.unregister_buffer(address)
    store.close()


def main():
    options = parse(sys.argv[1:])
    if options.worker:
        return {"hold": hold, "measure": measure}[options.worker](options)
    numbers = lambda text: [int(number) for number in text.split(",")]
    points = redis(options, numbers(options.value_bytes), numbers(options.clients)) + mooncake(options)
    print("| peer | | value | clients or batch | GB/s | cores per GB/s (Mooncake: client only) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for p in points:
        print(f"| {p['peer']} | {p['operation']} | {p['value_bytes']} | {p['clients']} | {p['gbps']:.2f} | {p['cores_per_gbps']:.2f} |")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(points, indent=1) + "\n")


if __name__ == "__main__":
    main()
