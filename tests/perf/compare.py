"""Compares longshore with llama.cpp on the same model file and machine, exact attention on both sides.

llama.cpp comes as the package llama-cpp-python, in a virtual environment that is made when it is missing (compiling takes
some minutes). It runs from the file itself and from F16 and Q4_0 variants of it, with flash attention on and off. Both
programs run in turn, every measurement in a process of its own; medians, all samples and ratios come out as Markdown and JSON.

points: ppN is the prefill of N random tokens; tgN is decode behind N positions; first is loading the model and the first
token of a 2,032-token prompt (seconds, so less is better). The usual ones take hours on a small machine because llama.cpp
needs many minutes for the long prompts; `--points pp512,pp2048,tg0` takes some minutes.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import venv

PACKAGE = "llama-cpp-python==0.3.36"
ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = pathlib.Path(__file__).resolve().with_name("llama_point.py")
POINTS = "pp512,pp2048,pp8192,pp16384,pp32768,tg0,tg8192,tg16384,tg32768,first"
FIRST_TOKENS = 2032
# Some virtual machines announce AMX and refuse it.
REFUSED = """: an instruction that this machine refuses; hint: delete the virtual environment, set
CMAKE_ARGS="-DCMAKE_C_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16' -DCMAKE_CXX_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'"
and run this again"""
WEIGHTS = ["own", "F16", "Q4_0"]
# Parts of a report of `longshore bench compute` that hold figures.
CONTENTS = ["attention", "linear", "model", "first_token"]


def cache_folder():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(base) / "longshore" / "perf"


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--longshore", default=str(ROOT / "target/release/longshore"), help="program to measure [%(default)s]")
    add("--model", help="GGUF file [the default model's, which `longshore model pull` fetches]")
    add("--venv", default=str(cache_folder() / "venv"), help="virtual environment of llama.cpp [%(default)s]")
    add("--cache", default=str(cache_folder()), help="folder of the model's variants [%(default)s]")
    add("--points", default=POINTS, help="points, separated by commas [%(default)s]")
    add("--rounds", type=int, default=3, help="alternating runs of each point [%(default)s]")
    add(
        "--settings",
        choices=["best", "all"],
        default="best",
        help="llama.cpp with the setting that a shorter run shows to be fastest, or with all [%(default)s]",
    )
    add("--threads", type=int, default=2, help="compute threads of both [%(default)s]")
    add("--steps", type=int, default=32, help="decode steps of a sample [%(default)s]")
    add("--bench-flags", default="", help="more flags for `longshore bench compute`, for example '--linear f32'")
    add("--json", metavar="FILE", help="write all samples as JSON")
    add("--without-peer", action="store_true", help="measure longshore alone; needs no llama.cpp")
    add("--dry-run", action="store_true", help="print the commands of the first round instead of running them")
    options = parser.parse_args(arguments)
    try:
        options.points = [Point.parse(text) for text in options.points.split(",")]
    except ValueError as error:
        parser.error(f"argument --points: {error}")
    if options.rounds < 1 or options.threads < 1 or options.steps < 1:
        parser.error("--rounds, --threads and --steps must be at least 1")
    return options


@dataclasses.dataclass(frozen=True)
class Point:
    """What is measured."""

    kind: str
    tokens: int

    @classmethod
    def parse(cls, text):
        if text == "first":
            return cls("first", FIRST_TOKENS)
        match = re.fullmatch(r"(pp|tg)(\d+)", text)
        if not match or (match[1] == "pp" and int(match[2]) == 0):
            raise ValueError(f"`{text}` is no point; hint: write pp512, tg0 or first")
        return cls(match[1], int(match[2]))

    @property
    def name(self):
        return "first token, s" if self.kind == "first" else f"{self.kind}{self.tokens}"

    @property
    def samples(self):
        """Short points are sampled several times in a process."""
        return 3 if self.kind != "first" and self.tokens < 8192 else 1

    def shorter(self):
        """The point that tells the fastest setting."""
        tokens = self.tokens if self.tokens <= 512 else min(8192, max(512, self.tokens // 4))
        return dataclasses.replace(self, tokens=tokens)


@dataclasses.dataclass(frozen=True)
class Setting:
    """How llama.cpp runs."""

    weights: str
    flash_attention: str

    @property
    def name(self):
        return f"{self.weights} weights, flash attention {self.flash_attention}"


SETTINGS = [Setting(weights, flash) for weights in WEIGHTS for flash in ("on", "off")]


def note(text):
    print(text, file=sys.stderr, flush=True)


def run(command):
    """Standard output of a command that works."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        hint = REFUSED if done.returncode == -signal.SIGILL else ""
        sys.exit(f"compare: `{' '.join(command)}` failed with {done.returncode}{hint}")
    return done.stdout


class Peer:
    """llama.cpp."""

    def __init__(self, options, model):
        self.options, self.model = options, model
        self.folder = pathlib.Path(options.cache)
        self.python = str(pathlib.Path(options.venv) / "bin/python")
        self.states = None
        self.best = {}

    def provide(self):
        """Makes the environment and the variants of the model that are missing."""
        if not os.path.exists(self.python):
            note(f"making a virtual environment in {self.options.venv}")
            venv.create(self.options.venv, with_pip=True)
        probe = subprocess.run([self.python, "-c", "import llama_cpp, numpy"], capture_output=True)
        if probe.returncode:
            note(f"installing {PACKAGE}: it is compiled for this machine, which takes some minutes")
            run([self.python, "-m", "pip", "install", "--quiet", PACKAGE, "numpy"])
        self.folder.mkdir(parents=True, exist_ok=True)
        for weights in WEIGHTS[1:]:
            path = self.variant(weights)
            if not path.exists():
                note(f"making {path}")
                partial = path.with_suffix(".partial")
                arguments = ["--model", self.model, "--type", weights, "--out", str(partial)]
                run([self.python, str(WORKER), "quantize", *arguments])
                partial.replace(path)
        self.states = tempfile.TemporaryDirectory(dir=self.folder, prefix="states-")

    def version(self):
        return json.loads(run([self.python, str(WORKER), "version"]))

    def variant(self, weights):
        if weights == "own":
            return pathlib.Path(self.model)
        return self.folder / f"{pathlib.Path(self.model).stem}.{weights}.gguf"

    def command(self, point, setting, samples):
        command = [self.python, str(WORKER), "point", "--model", str(self.variant(setting.weights))]
        command += ["--kind", point.kind, "--tokens", str(point.tokens), "--samples", str(samples)]
        command += ["--steps", str(self.options.steps), "--threads", str(self.options.threads)]
        command += ["--flash-attention", setting.flash_attention]
        if point.kind == "tg" and point.tokens and self.states:
            state = f"{setting.weights}-{setting.flash_attention}-{point.tokens}"
            command += ["--state", os.path.join(self.states.name, state)]
        return command

    def measure(self, point, setting):
        result = json.loads(run(self.command(point, setting, point.samples)))
        return result["samples"], result["peak_rss_bytes"]

    def settings(self, point):
        """The settings to run a point with."""
        if self.options.settings == "all":
            return SETTINGS
        shorter = point.shorter()
        if shorter not in self.best:
            note(f"looking for llama.cpp's best setting with {shorter.name}")
            found = {setting: statistics.median(self.measure(shorter, setting)[0]) for setting in SETTINGS}
            for setting, figure in found.items():
                note(f"  {setting.name}: {figure:.2f}")
            least = point.kind == "first"
            self.best[shorter] = (min if least else max)(found, key=found.get), found
        return [self.best[shorter][0]]


class Ours:
    """longshore."""

    def __init__(self, options, model):
        self.options, self.model = options, model
        self.conditions = {}

    def command(self, point):
        command = [self.options.longshore, "bench", "compute", "--model", self.model, "--json", "-"]
        command += ["--threads", str(self.options.threads), "--repeats", str(point.samples)]
        if point.kind == "pp":
            command += ["--only", "prefill", "--lengths", str(point.tokens)]
        elif point.kind == "tg":
            command += ["--only", "decode", "--depths", str(point.tokens), "--steps", str(self.options.steps)]
        else:
            command += ["--only", "first-token"]
        return command + self.options.bench_flags.split()

    def measure(self, point):
        report = json.loads(run(self.command(point)))
        # The machine with its peaks, the instruction set and the settings of the last run.
        self.conditions = {key: report[key] for key in report if key not in CONTENTS}
        if point.kind == "first":
            return report["first_token"]["seconds"]["samples"], None
        model = report["model"]
        (found,) = model["points"]
        assert found["tokens"] == point.tokens, report
        # Where the system does not tell, the figures are null.
        peak = max(model["load_peak_rss_bytes"] or 0, found["peak_rss_bytes"] or 0) or None
        return found["rate"]["samples"], peak


def compare(options, ours, peer):
    """One row for each point and setting."""
    rows = []
    for point in options.points:
        settings = peer.settings(point) if peer else [None]
        sides = [("longshore", None), *(("llama.cpp", setting) for setting in settings if setting)]
        samples = {side: [] for side in sides}
        memory = {side: [] for side in sides}
        for turn in range(options.rounds):
            # Whoever went first goes last the next time.
            for side in sides if turn % 2 == 0 else reversed(sides):
                who, setting = side
                taken, peak = ours.measure(point) if setting is None else peer.measure(point, setting)
                samples[side].append(taken)
                memory[side].append(peak)
                name = f"{who} ({setting.name})" if setting else who
                note(f"{point.name}, round {turn + 1}: {name}: {statistics.median(taken):.2f}")
        for side in sides[1:] or [None]:
            rows.append(row(point, side, samples, memory))
    return rows


def row(point, side, samples, memory):
    def median(of):
        return statistics.median(statistics.median(taken) for taken in samples[of])

    def peak(of):
        return max((bytes for bytes in memory[of] if bytes), default=None)

    own = ("longshore", None)
    found = {"point": point.name, "longshore": median(own), "longshore_samples": samples[own]}
    found["longshore_peak_rss_bytes"] = peak(own)
    if side:
        theirs = {"llama_cpp": median(side), "llama_cpp_samples": samples[side], "setting": side[1].name}
        theirs |= {"llama_cpp_peak_rss_bytes": peak(side), "ratio": median(own) / median(side)}
        found |= theirs
    return found


def table(rows):
    def size(count):
        return f"{count / 2**20:.0f} MiB" if count else "-"

    lines = ["| point | longshore | llama.cpp | ratio | llama.cpp's setting | memory | its memory |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for found in rows:
        cells = [found["point"], f"{found['longshore']:.2f}"]
        if "ratio" in found:
            cells += [f"{found['llama_cpp']:.2f}", f"{found['ratio']:.2f}", found["setting"]]
        else:
            cells += ["-", "-", "-"]
        cells += [size(found["longshore_peak_rss_bytes"]), size(found.get("llama_cpp_peak_rss_bytes"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def dry_run(options, ours, peer):
    for point in options.points:
        print(" ".join(ours.command(point)))
        for setting in [] if options.without_peer else SETTINGS:
            print(" ".join(peer.command(point, setting, point.samples)))


def main():
    options = parse(sys.argv[1:])
    if not options.model and options.dry_run:
        options.model = "MODEL.gguf"
    if not options.model:
        options.model = json.loads(run([options.longshore, "model", "show", "--json"]))["path"]
    ours, peer = Ours(options, options.model), Peer(options, options.model)
    if options.dry_run:
        return dry_run(options, ours, peer)
    report = {"model": options.model, "threads": options.threads, "rounds": options.rounds, "bench_flags": options.bench_flags}
    if options.without_peer:
        peer = None
    else:
        peer.provide()
        report["peer"] = peer.version()
    report["rows"] = compare(options, ours, peer)
    report["conditions"] = ours.conditions
    if peer:
        report["probes"] = {
            point.name: {setting.name: figure for setting, figure in found.items()}
            for point, (_, found) in peer.best.items()
        }
    print(table(report["rows"]))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
