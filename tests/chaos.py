"""Kills the scripts at every file operation; the same command again must end in the same bytes.

    python tests/chaos.py            every operation: ten minutes on two cores
    python tests/chaos.py --quick    a sample, in 20 seconds

The file operations of an undisturbed run are counted. Then, at the n-th of them, a run is killed
(before it, or after half of its bytes), or the disk is full from there on, or a signal arrives, or
a second process starts with the same --out. Every run is a fork of this process, which imports
PyTorch and never computes: afterwards a fork would not be safe. Linux only.
"""

import argparse
import builtins
import errno
import gc
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402
import jinja2.sandbox  # noqa: E402, F401  else every fork imports it
import numpy as np  # noqa: E402
import safetensors.numpy  # noqa: E402
import safetensors.torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  else every fork imports it

import data  # noqa: E402
import evaluate  # noqa: E402
import generate  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402

model.MAX_FILE_BYTES = 400_000  # two files and an index for a checkpoint, one file for a model
SCRIPTS = {"generate": generate, "train": train, "evaluate": evaluate}
SIZE = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 256}
PATIENCE_S = 60  # a run takes about one
MISTAKE = 2
KILLED = -signal.SIGKILL
# the faults, each with the statuses by which a run may end after it
FAULTS = {
    "SIGKILL": [KILLED],
    "half": [KILLED],  # after half of the bytes of a write
    "full": [MISTAKE],  # the disk has no space from there on
    "SIGTERM": [0, 128 + signal.SIGTERM],
    "SIGINT": [0, 128 + signal.SIGINT],
    "SIGINT SIGINT": [-signal.SIGINT, 128 + signal.SIGINT],
}
STOPS = ("SIGTERM", "SIGINT")
WRITES = ("write", "sendfile", "serialize_file")  # operations that write bytes
TIMES = {"seconds": 0, "memory_gib": 0}  # of metrics.jsonl: they differ between two runs


# 1. Faults: what happens at the n-th file operation below a folder


class Faults:
    """Counts operations that change files; at the `at`-th the fault `how` happens.

    how: a key of FAULTS, or another name of a signal.
    """

    def __init__(self, at: int = 0, how: str = ""):
        self.at = at
        self.how = how
        self.folder = ""
        self.trace = []  # (operation, path below the folder)
        self.full = False

    def count(self, operation: str, file) -> float:
        """Counts an operation -> the share of its bytes that is to be written."""
        path = path_of(file)
        if not path.startswith(self.folder):
            return 1
        self.trace.append((operation, path.removeprefix(self.folder)))
        if len(self.trace) == self.at:
            return self.happen()
        return 0 if self.full else 1

    def happen(self) -> float:
        if self.how in ("half", "full"):
            self.full = True
            return 0.5
        for name in self.how.split():
            signal.raise_signal(signal.Signals[name])
        return 1

    def fail(self):
        """Ends a write that is not complete."""
        if self.how == "half":
            signal.raise_signal(signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self, folder: Path):
        """Counts in every function that changes a file below `folder`."""
        self.folder = f"{folder}/"
        for name in ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "fsync", "open"):
            self.wrap(name)
        self.wrap_open()
        self.wrap_writer(os, "sendfile", 0)  # shutil copies by it
        # save_file, by whatever name it is known, writes by it
        self.wrap_writer(safetensors.torch, "serialize_file", 1)

    def wrap(self, name):
        """Counts the calls of a function of `os`."""
        real = getattr(os, name)

        def counted(file, *rest, dir_fd=None, **options):
            path = file
            if dir_fd is not None:
                options["dir_fd"] = dir_fd
                path = os.path.join(path_of(dir_fd), file)
            if name != "open" or rest[0] & os.O_CREAT:
                self.count(name, path)
            return real(file, *rest, **options)

        setattr(os, name, counted)

    def wrap_open(self):
        real = io.open

        def counted(file, mode="r", *rest, **options):
            if isinstance(file, int) or mode in ("r", "rb"):
                return real(file, mode, *rest, **options)
            self.count("open", file)
            opened = real(file, mode, *rest, **options)
            return CountedFile(opened, self)

        io.open = counted
        builtins.open = counted

    def wrap_writer(self, module, name, place):
        """Counts the calls of a function that writes the file that is its argument `place`."""
        real = getattr(module, name)

        def counted(*arguments, **options):
            file = arguments[place]
            share = self.count(name, file)
            done = real(*arguments, **options)
            if share < 1:
                size = os.stat(file).st_size
                os.truncate(file, int(share * size))
                self.fail()
            return done

        setattr(module, name, counted)


class CountedFile:
    """A file whose writes and closing are counted."""

    def __init__(self, file, faults):
        self.file = file
        self.faults = faults

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def write(self, content):
        share = self.faults.count("write", self.name)
        if share == 1:
            return self.file.write(content)
        size = int(share * len(content))
        self.file.write(content[:size])
        self.file.flush()
        self.faults.fail()

    def close(self):
        if not self.closed:
            self.faults.count("close", self.name)
        self.file.close()


def path_of(file) -> str:
    """The whole path of a file, by its name or its number."""
    if isinstance(file, int):
        return os.readlink(f"/proc/self/fd/{file}")
    return os.path.abspath(file)


def unflushed(trace) -> set[str]:
    """Files that a rename made valid before their bytes were on the disk."""
    dirty = set()
    early = set()
    for operation, path in trace:
        if operation in WRITES:
            dirty.add(path)
        elif operation in ("fsync", "unlink", "remove"):
            dirty.discard(path)
        elif operation in ("rename", "replace"):
            whole = path.removesuffix("config.json.tmp")  # it completes its folder
            early |= {file for file in dirty if file.startswith(whole)}
    return early


# 2. Runs in forks of this process


@dataclass
class Case:
    """A script with its arguments, those that finish a stopped run, and what a run leaves."""

    name: str
    script: str
    out: str
    inputs: Path  # the folder that each run gets a copy of
    arguments: list[str]
    again: list[str]
    expected: dict = field(default_factory=dict)  # `contents` after an undisturbed run
    trace: list = field(default_factory=list)  # its operations

    def measure(self, folder: Path):
        """Fills in `expected` and `trace`."""
        shutil.copytree(self.inputs, folder)
        run = Run(self, folder, self.arguments).wait()
        assert run.ended_by(0), run
        self.expected = contents(folder)
        text = folder.with_name("trace").read_text()
        self.trace = json.loads(text)

    def operations(self, part: str) -> list[int]:
        """The numbers of the operations on paths that contain `part`."""
        numbers = []
        for n, (_, path) in enumerate(self.trace, 1):
            if part in path:
                numbers.append(n)
        return numbers


def fork(work: Callable) -> int:
    """Does `work` in a fork -> its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except SystemExit as e:
        status = e.code or 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Run:
    """A script that runs in `folder`; its errors and its trace are written beside that."""

    def __init__(self, case, folder, arguments, faults=None, environment=None):
        self.folder = folder
        self.command = [f"{ROOT}/{case.script}.py", *arguments]
        self.script = SCRIPTS[case.script]
        self.faults = faults or Faults()
        self.environment = environment or {}
        self.status = None
        self.errors = ""
        self.pid = fork(self.work)

    def work(self):
        signal.alarm(PATIENCE_S)  # it ends a run that hangs
        os.chdir(self.folder)
        os.environ |= self.environment
        errors = self.folder.with_name(f"{os.getpid()}.err")
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        if self.faults.how == "exec":
            os.execv(sys.executable, [sys.executable, *self.command])
        sys.argv = self.command
        self.faults.install(self.folder)
        data.cli(self.script.main, self.script.parser())
        if not self.faults.how:
            text = json.dumps(self.faults.trace)
            self.folder.with_name("trace").write_text(text)

    def wait(self) -> "Run":
        """Waits until the script has ended -> itself."""
        _, status = os.waitpid(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        file = self.folder.with_name(f"{self.pid}.err")
        self.errors = file.read_text("utf-8", "replace")
        return self

    def __str__(self):
        return f"status {self.status}, {self.errors[-500:]!r}"

    def ended_by(self, *statuses: int) -> bool:
        """Whether it ended by one of them: MISTAKE with its one line, none with a traceback."""
        lines = self.errors.replace("\r", "\n")  # after progress bars
        mistakes = len(re.findall("^error: ", lines, re.MULTILINE))
        if mistakes != (self.status == MISTAKE) or "Traceback" in lines:
            return False
        return self.status in statuses


def start_ranks(case, folder, arguments, faults):
    """Starts a rank for each of `faults`; a single one without torchrun's variables."""
    if len(faults) == 1:
        return [Run(case, folder, arguments, *faults)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _, port = free.getsockname()
    runs = []
    for rank, own in enumerate(faults):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(faults)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        runs.append(Run(case, folder, arguments, own, environment))
    return runs


# 3. What a run must leave, and what it must not touch


def contents(folder: Path) -> dict:
    """The content of each file, without times."""
    found = {}
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        if file.is_dir():
            found[name] = "folder"
            continue
        found[name] = file.read_bytes()
        if file.name == "metrics.jsonl":
            lines = file.read_text().splitlines()
            found[name] = [json.loads(line) | TIMES for line in lines]
        if file.name == "args.json":
            found[name] = json.loads(file.read_text()) | {"resume": None}
    return found


def differences(expected: dict, found: dict, rounded: bool = False) -> str:
    """What is missing, left over or changed, in a line; empty where nothing is.

    rounded: numbers of training may differ in their last bits, as by the number of ranks.
    """
    faults = []
    for name in sorted(expected | found):
        old = expected.get(name)
        new = found.get(name)
        if new is None:
            faults.append(f"missing {name}")
        elif old is None:
            faults.append(f"left over {name}")
        elif rounded and name.endswith((".safetensors", "metrics.jsonl")):
            if not is_close(numbers(old), numbers(new)):
                faults.append(f"changed {name}")
        elif old != new:
            faults.append(f"changed {name}")
    return ", ".join(faults)


def is_close(a, b) -> bool:
    if a.shape != b.shape:
        return False
    return np.allclose(a, b, rtol=0, atol=1e-4)


def numbers(content) -> np.ndarray:
    """All weights of a file, or step and loss of each line of metrics.jsonl."""
    if isinstance(content, bytes):
        weights = safetensors.numpy.load(content)
        return np.concatenate([weights[name].ravel() for name in sorted(weights)])
    pairs = []
    for line in content:
        loss = "valid_loss" if "valid" in line else "loss"
        pairs.append([line["step"], line[loss]])
    return np.array(pairs)


def put_foreign(case: Case, folder: Path) -> dict:
    """Writes files of somebody else beside and into the outputs -> them, and their folders.

    Not into a checkpoint, nor into a folder whose settings file is not complete: the script
    refuses that.
    """
    stem = case.out.removesuffix(".jsonl")
    names = [
        ".DS_Store",
        f"{case.out}.bak",
        f"{case.out}.parts.bak/x.txt",
        f"{stem}.meta.json.bak",
    ]
    if data.is_own(folder / case.out / "args.json"):
        names.append(f"{case.out}/checkpoint/step-1.bak/x.txt")
    settings = [*folder.rglob("args.json"), *folder.rglob("settings.json")]
    for file in filter(data.is_own, settings):
        for inner, _, _ in os.walk(file.parent):
            name = os.path.relpath(f"{inner}/.DS_Store", folder)
            within = inner.removeprefix(str(file.parent))
            if "checkpoint/step-" not in name and ".parts" not in within:
                names.append(name)
    found = {}
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"not yours")
        found[name] = b"not yours"
        for parent in Path(name).parents[:-1]:
            found[str(parent)] = "folder"
    return found


def finish(case: Case, folder: Path, ranks: int = 1, rounded: bool = False) -> str:
    """Runs the command again beside foreign files -> what is wrong then, or ""."""
    foreign = put_foreign(case, folder)
    faults = [Faults() for _ in range(ranks)]
    for run in start_ranks(case, folder, case.again, faults):
        if not run.wait().ended_by(0):
            return f"the run after it: {run}"
    return differences(case.expected | foreign, contents(folder), rounded)


# 4. The tests: one fault each -> what is wrong, or "". `folder` holds the inputs


def disturb(case, folder, at, how):
    """A fault at an operation, then the same command again."""
    run = Run(case, folder, case.arguments, Faults(at, how)).wait()
    if not run.ended_by(*FAULTS[how]):
        return str(run)
    return finish(case, folder)


def kill_ranks(case, folder, at, how):
    """One of two ranks is killed, then other ranks finish. how: the one, and their number."""
    killed, later = map(int, how.split("-"))
    faults = [Faults(), Faults()]
    faults[killed] = Faults(at, "SIGKILL")
    runs = start_ranks(case, folder, case.arguments, faults)
    first = runs.pop(killed).wait()
    if first.status == KILLED:
        os.kill(runs[0].pid, signal.SIGKILL)  # as torchrun does
    runs[0].wait()
    if not first.ended_by(0, KILLED):  # rank 1 may have fewer operations
        return str(first)
    return finish(case, folder, later, rounded=True)


def stop_ranks(case, folder, at, how):
    """A signal to one of two ranks stops both after the step."""
    faults = [Faults(at, how), Faults()]
    for run in start_ranks(case, folder, case.arguments, faults):
        if not run.wait().ended_by(*FAULTS[how]):
            return str(run)
    return finish(case, folder, 2, rounded=True)


def race(case, folder, at, how):
    """A second process starts while the first one is at an operation, and has the lock."""
    first = Run(case, folder, case.arguments, Faults(at, "SIGSTOP"))
    os.waitpid(first.pid, os.WUNTRACED)
    second = Run(case, folder, case.again).wait()
    os.kill(first.pid, signal.SIGCONT)
    first.wait()
    if not first.ended_by(0) or not second.ended_by(MISTAKE):
        return f"{first}; {second}"
    return differences(case.expected, contents(folder))


def start_twice(case, folder, at, how):
    """A second process starts `at` milliseconds after the first, wherever that is then."""
    first = Run(case, folder, case.arguments)
    time.sleep(at / 1000)
    second = Run(case, folder, case.arguments)
    runs = [first.wait(), second.wait()]
    one_ended_well = any(run.ended_by(0) for run in runs)
    if not one_ended_well or not all(run.ended_by(0, MISTAKE) for run in runs):
        return f"{first}; {second}"
    return differences(case.expected, contents(folder))


def interrupt(case, folder, at, how):
    """A signal `at` milliseconds after the script itself has started: it imports PyTorch."""
    run = Run(case, folder, case.arguments, Faults(0, "exec"))
    time.sleep(at / 1000)
    number = signal.Signals[how]
    os.kill(run.pid, number)
    run.wait()
    sound = run.ended_by(-number, *FAULTS[how])
    return finish(case, folder) if sound else str(run)


def small_disk(case, folder, at, how):
    """A disk of `at` KiB, which then grows."""
    disk = folder.with_name("disk")
    assert mount(disk, f"size={at}k")
    try:
        shutil.copytree(folder, disk, dirs_exist_ok=True)
        run = Run(case, disk, case.arguments).wait()
        if not run.ended_by(0, MISTAKE):
            return str(run)
        assert mount(disk, "remount,size=64m")
        return finish(case, disk)
    finally:
        subprocess.run(["umount", disk], check=True)


def mount(folder: Path, options: str) -> bool:
    """Makes `folder` a disk of memory -> whether this machine can do that."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if not shutil.which("mount"):
        return False
    done = subprocess.run(command, capture_output=True)
    return done.returncode == 0


# 5. All cases, and all points of a case


def write_inputs(folder: Path, inputs: Path):
    """A tiny model, its base, and data for each script."""
    conftest.write_tokenizer(folder / "model")
    shutil.copytree(folder / "model", folder / "base")  # the same vocabulary
    for i, name in enumerate(("model", "base")):
        conftest.write_model(folder / name, seed=i, **SIZE)
    pairs = [pair | {"id": f"p{i}"} for i, pair in enumerate(conftest.PAIRS[:5])]
    rows = {"pairs": pairs, "prompts": [], "choice": [], "numeric": []}
    for i, pair in enumerate(pairs[:2]):
        prompt = {"prompt": pair["source"], "harmful": i == 0}
        choice = {"choices": ["Yes.", "No."], "answer": 1}
        question = {"question": pair["source"], "answer": "#### 4"}
        rows["prompts"].append(prompt)
        rows["choice"].append(prompt | choice)
        rows["numeric"].append(question)
    inputs.mkdir()
    for name, content in rows.items():
        conftest.write_jsonl(inputs / f"{name}.jsonl", content)


RATIONALES = """--model DIR/model --data pairs.jsonl --cue \\n
    --max-new-tokens 6 --batch-size 2 --out"""
ANSWERS = """--model DIR/base --data prompts.jsonl --task answer
    --max-new-tokens 6 --out"""
TRAINING = """--model DIR/model --data ledger.jsonl --valid v=pairs.jsonl --out tuned
    --batch-size 2 --max-steps 4 --learning-rate 1e-3
    --save-every 1 --export-every 2 --valid-every 2"""
TESTS = """--model DIR/model --out results --max-new-tokens 6 --batch-size 2
    --translation pairs.jsonl --choice choice.jsonl --numeric numeric.jsonl
    --safety prompts.jsonl --drift answers.jsonl --base DIR/base"""


def make_cases(folder: Path) -> list[Case]:
    """Each script, and training that is resumed."""
    inputs = folder / "inputs"
    _, status = os.waitpid(fork(lambda: write_inputs(folder, inputs)), 0)
    assert status == 0

    def make(script, out, command, again=""):
        words = command.replace("DIR", str(folder)).split()
        again = [*words, *again.split()]
        return Case(script, script, out, inputs, words, again)

    for command in (f"{ANSWERS} answers.jsonl", f"{RATIONALES} ledger.jsonl"):
        case = make("generate", "", command)
        run = Run(case, inputs, case.arguments).wait()
        assert run.ended_by(0), run
    written = make("generate", "r.jsonl", f"{RATIONALES} r.jsonl")
    trained = make("train", "tuned", TRAINING, "--resume")
    resumed = make("train", "tuned", f"{TRAINING} --resume")
    measured = make("evaluate", "results", TESTS)
    for case in (written, trained, measured):
        case.measure(folder / case.name / "run")
    # it was killed while it wrote its third checkpoint
    resumed.name = "train --resume"
    resumed.inputs = shutil.copytree(inputs, folder / "killed")
    third = trained.operations("/step-3.tmp/")
    fault = Faults(third[len(third) // 2], "SIGKILL")
    run = Run(trained, resumed.inputs, trained.arguments, fault).wait()
    assert run.ended_by(KILLED), run
    resumed.measure(folder / resumed.name / "run")
    resumed.expected = trained.expected
    return [written, trained, resumed, measured]


class Point(NamedTuple):
    test: Callable
    case: Case
    at: int
    how: str

    def __str__(self):
        name = self.test.__name__
        return f"{name} {self.case.name} {self.at} {self.how}".strip()


def make_points(case: Case, disks: bool) -> list[Point]:
    """Every operation is a point; signals, ranks, races and small disks are a sample."""
    points = []

    def add(test, places, *hows):
        for at in places:
            for how in hows:
                points.append(Point(test, case, at, how))

    every = range(1, len(case.trace) + 1)
    # the second operation opens the settings file, which is the lock; at the last it may be gone
    held = range(3, len(every))
    add(disturb, every, "SIGKILL")
    writes = [n for n in every if case.trace[n - 1][0] in WRITES]
    add(disturb, writes, "half", "full")
    add(disturb, every[4::5], *STOPS)
    add(race, spread(held, 6), "")
    add(start_twice, (0, 10, 30, 100, 300), "")
    add(interrupt, (300, 1000, 1700, 2400), *STOPS)
    add(kill_ranks, spread(every, 4), "0-4")
    add(kill_ranks, (2, 4, 6, 8), "1-1")  # rank 1 has few operations
    if case.script == "train":  # it ends after a step, the others at once
        running = range(case.operations("/args.json")[-1] + 1, len(every))
        add(stop_ranks, spread(running, 6), "SIGTERM")
        add(disturb, spread(running, 6), "SIGINT SIGINT")
    if disks:
        least = sum(map(pages, contents(case.inputs).values()))
        most = sum(map(pages, case.expected.values()))
        add(small_disk, spread(range(least + 4, 3 * most), 12), "")
    return points


def spread(numbers: range, count: int) -> list[int]:
    """`count` of the numbers, the first and the last among them."""
    last = len(numbers) - 1
    return [numbers[i * last // (count - 1)] for i in range(count)]


def pages(content) -> int:
    """KiB that a file or a folder takes on a disk of memory."""
    size = len(content) if isinstance(content, bytes) else 1
    return 4 * math.ceil(size / 4096)


def carry_out(point: Point, folder: Path) -> str:
    """Tests a point in a new folder -> what is wrong, or ""."""
    test, case, at, how = point
    try:
        inputs = shutil.copytree(case.inputs, folder / "run")
        return test(case, inputs, at, how)
    except Exception:
        return f"the test itself failed: {traceback.format_exc()}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(case: Case, points: list, faults: list) -> int:
    """Prints what has failed -> how many."""
    kinds = Counter(point.test.__name__ for point in points)
    counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    failed = len(points) - faults.count("")
    print(f"{case.name}: {len(case.trace)} operations; {counts}; {failed} failed")
    for point, fault in zip(points, faults):
        operation = ""
        if point.test in (disturb, race):
            operation = " ".join(case.trace[point.at - 1])
        if fault:
            print(f"    {point}: {operation}: {fault}")
    early = unflushed(case.trace)
    for path in sorted(early):
        print(f"    valid before it is on the disk: {path}")
    sys.stdout.flush()
    return failed + len(early)


def main(args: argparse.Namespace) -> int:
    gc.freeze()  # or every fork would visit, and so copy, what was imported
    failed = 0
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as name:
        folder = Path(name).resolve()
        cases = make_cases(folder)
        disks = mount(folder / "disk", "size=64k")
        if disks:
            subprocess.run(["umount", folder / "disk"], check=True)
        for case in cases:
            points = make_points(case, disks)
            if args.only:
                points = [point for point in points if str(point) in args.only]
            if args.quick:
                points = [point for point in points if point.test is not interrupt]
                points = random.Random(0).sample(points, 6)
            folders = [folder / f"{case.name} {i}" for i in range(len(points))]
            with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
                faults = pool.starmap(carry_out, zip(points, folders), chunksize=1)
            failed += report(case, points, faults)
    return int(failed > 0)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="a sample of the points")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="points at a time")
    p.add_argument("--only", nargs="+", help="these points, by the names that failures have")
    sys.exit(main(p.parse_args()))
