"""Kills the scripts at every file operation; the same command again must end in the same bytes.

    python tests/chaos.py            every operation, in about five minutes on two cores
    python tests/chaos.py --quick    a sample, in 20 seconds

No times are guessed: the operations are counted in an undisturbed run, and at the n-th of them the
next run dies by SIGKILL, before it or after half of its bytes; or the disk is full from there on;
or a signal arrives; or a second process starts with the same --out. Every run is a fork of this
process, which has imported PyTorch but never used it: one that has can't be forked safely. Linux.
"""

import argparse
import builtins
import errno
import io
import json
import os
import random
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

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402
import safetensors.torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  the first operation would import it, in every fork
from safetensors import SafetensorError  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import generate  # noqa: E402
import train  # noqa: E402

SCRIPTS = {"generate": generate, "train": train, "evaluate": evaluate}
PATIENCE_S = 60  # a run takes less than one
KILLED = -signal.SIGKILL
MISTAKE = 2
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
SIZE = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 256}
TIMES = ("seconds", "memory_gib")  # of metrics.jsonl: what no two runs have alike


# 1. Faults: what happens at the n-th file operation below a folder


class Faults:
    """Counts operations that change files below `folder`; at the `at`-th the fault `how` happens.

    kill, half (torn after half of its bytes, then killed), full (no space from here on), SIGTERM,
    SIGINT, or wait (until a byte comes from the pipe `gate`).
    """

    def __init__(self, folder: Path, at: int = 0, how: str = "", gate: tuple[int, int] = (0, 0)):
        self.folder = str(folder)
        self.at = at
        self.how = how
        self.gate = gate
        self.trace = []  # (name, path) of each operation
        self.full = False

    def reach(self, name: str, path) -> bool:
        """Counts an operation -> whether only half of its bytes are to be written."""
        path = os.path.abspath(os.fspath(path))
        if not path.startswith(self.folder):
            return False
        self.trace.append((name, path))
        if len(self.trace) != self.at:
            return False
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.how])
        if self.how == "wait":
            os.write(self.gate[1], b"x")
            os.read(self.gate[0], 1)
        if self.how == "full":
            self.full = True
        return self.how in ("half", "full")

    def after_half(self):
        """What follows half of the bytes of a write."""
        if self.how == "half":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self):
        """Puts the counter before every function that changes a file."""
        self.wrap_open()
        self.wrap_save()
        self.wrap_sendfile()
        for name in ("mkdir", "rmdir", "unlink", "remove", "rename", "replace"):
            self.wrap_path(name)
        fsync = os.fsync

        def counted(handle):
            number = handle if isinstance(handle, int) else handle.fileno()
            self.reach("fsync", os.readlink(f"/proc/self/fd/{number}"))
            fsync(handle)

        os.fsync = counted

    def wrap_path(self, name: str):
        operation = getattr(os, name)

        def counted(path, *rest, **options):
            whole = path
            if options.get("dir_fd") is not None:
                whole = os.path.join(os.readlink(f"/proc/self/fd/{options['dir_fd']}"), path)
            self.reach(name, whole)
            return operation(path, *rest, **options)

        setattr(os, name, counted)

    def wrap_open(self):
        real = io.open

        def counted(file, mode="r", *rest, **options):
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return real(file, mode, *rest, **options)
            self.reach("open", file)
            return CountedFile(real(file, mode, *rest, **options), self)

        io.open = counted
        builtins.open = counted

    def wrap_save(self):
        """safetensors writes by itself, not through Python's files."""
        real = safetensors.torch.serialize_file

        def counted(tensors, file, **options):
            half = self.reach("save", file)
            if half or self.full:
                real(tensors, file, **options)
                os.truncate(file, os.path.getsize(file) // 2)
                if self.how == "half":
                    self.after_half()
                raise SafetensorError("No space left on device")
            real(tensors, file, **options)

        safetensors.torch.serialize_file = counted

    def wrap_sendfile(self):
        """By which shutil copies files."""
        real = os.sendfile

        def counted(target, source, offset, count):
            half = self.reach("send", os.readlink(f"/proc/self/fd/{target}"))
            if half or self.full:
                real(target, source, offset, os.fstat(source).st_size // 2)
                self.after_half()
            return real(target, source, offset, count)

        os.sendfile = counted


class CountedFile:
    """A file open for writing whose writes and closing are counted."""

    def __init__(self, file, faults: Faults):
        self.file = file
        self.faults = faults

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def write(self, content):
        half = self.faults.reach("write", self.file.name)
        if not half and not self.faults.full:
            return self.file.write(content)
        raw = isinstance(self.file, io.RawIOBase)
        self.file.write(content[: len(content) // 2 if half else 0])
        self.file.flush()
        if raw and half and self.faults.full:
            return len(content) // 2  # a system's write says how much it has written; so does raw
        self.faults.after_half()

    def close(self):
        if not self.file.closed:
            self.faults.reach("close", self.file.name)
        self.file.close()


def unflushed(trace: list[tuple[str, str]]) -> list[str]:
    """Files that were renamed before their last bytes were on the disk."""
    dirty = {}
    found = []
    for name, path in trace:
        if name in ("write", "save", "send"):
            dirty[path] = True
        elif name in ("fsync", "unlink", "remove"):
            dirty.pop(path, None)
        elif name in ("rename", "replace"):
            found += [file for file in dirty if file == path or file.startswith(path + "/")]
    return found


# 2. Runs in forks of this process


@dataclass
class Ended:
    status: int
    errors: str


def fork(work: Callable[[], int]) -> int:
    """Does `work` in a fork, which ends with the status that it returns -> its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = work()
    except SystemExit as e:
        status = e.code or 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(script: str, arguments: list[str], folder: Path, faults: Faults, ranks=(0, 1, 0)) -> int:
    """Starts a script in `folder` -> its process id. ranks: rank, world size, port."""
    log = folder.with_name(f"{folder.name}.log")

    def work() -> int:
        os.chdir(folder)
        torch.set_num_threads(1)
        output = os.open(log.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        name = f".{os.getpid()}.err"
        os.dup2(os.open(log.with_suffix(name), os.O_WRONLY | os.O_CREAT), 2)
        rank, world_size, port = ranks
        if world_size > 1:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            values = (rank, rank, world_size, "127.0.0.1", port)
            os.environ |= dict(zip(names, map(str, values)))
        sys.argv = [f"{script}.py", *arguments]
        module = SCRIPTS[script]
        faults.install()
        data.cli(module.main, module.parser())
        if not faults.how:
            trace = json.dumps(faults.trace)
            os.write(os.open(log.with_suffix(".trace"), os.O_WRONLY | os.O_CREAT), trace.encode())
        return 0

    return fork(work)


def wait(pid: int, folder: Path) -> Ended:
    """The end of a run; one that hangs is killed, and has the status None."""
    end = time.monotonic() + PATIENCE_S
    done = 0
    while not done and time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            time.sleep(0.002)
    if not done:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    file = folder.with_name(f"{folder.name}.{pid}.err")
    errors = file.read_text("utf-8", errors="replace") if file.exists() else ""
    return Ended(os.waitstatus_to_exitcode(status) if done else None, errors)


def run(script: str, arguments: list[str], folder: Path, faults: Faults | None = None) -> Ended:
    return wait(start(script, arguments, folder, faults or Faults(folder)), folder)


def start_ranks(case: "Case", arguments, folder: Path, faults: list[Faults]) -> list[int]:
    """Starts a rank for each of `faults` -> their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = len(faults)
    pids = []
    for rank, own in enumerate(faults):
        pids.append(start(case.script, arguments, folder, own, (rank, count, port)))
    return pids


def one_line(ended: Ended) -> bool:
    """Whether a run ended by a mistake that is told in one line, bars and library notes aside."""
    lines = [line.rsplit("\r", 1)[-1] for line in ended.errors.split("\n")]
    told = [line for line in lines if line.startswith("error: ")]
    return ended.status == MISTAKE and len(told) == 1 and "Traceback" not in ended.errors


# 3. Cases: a command, what it leaves, and what must not be touched


@dataclass
class Case:
    """A script with its arguments; `again` are those that finish a run that was stopped."""

    name: str
    script: str
    arguments: list[str]
    again: list[str]
    out: str
    inputs: Path  # a folder from which each run begins
    expected: dict[str, object] = field(default_factory=dict)
    trace: list[tuple[str, str]] = field(default_factory=list)

    def measure(self, work: Path):
        """The undisturbed run: what it leaves, and its operations."""
        folder = self.fresh(work / f"{self.name}-undisturbed")
        ended = run(self.script, self.arguments, folder)
        assert ended.status == 0, ended.errors
        self.trace = json.loads(folder.with_name(f"{folder.name}.trace").read_text())
        self.expected = self.expected or contents(folder)

    def fresh(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.inputs, folder))


def contents(folder: Path) -> dict[str, object]:
    """What stands in each file, less times; an empty lock may stay."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir():
            found[name] = "folder"
        elif file.name == "metrics.jsonl":
            found[name] = [less_times(line) for line in file.read_text().splitlines()]
        elif file.name == "args.json":
            found[name] = json.loads(file.read_text()) | {"resume": None}
        elif file.suffix != ".lock" or file.stat().st_size:
            found[name] = file.read_bytes()
    return found


def less_times(line: str) -> dict:
    """A line of metrics.jsonl without what no two runs have alike."""
    try:
        content = json.loads(line)
    except ValueError:
        return {"broken": line}
    return {name: value for name, value in content.items() if name not in TIMES}


def put_foreign(case: Case, folder: Path) -> dict[str, object]:
    """Files of somebody else beside and within what a run writes -> them and their folders."""
    names = [".DS_Store", f"{case.out}.bak", f"{case.out}.rank0", f"{case.out}.old/notes.txt"]
    parts = [str(f.relative_to(folder)) for f in folder.rglob("*.rank0") if f.is_file()]
    names += [f"{name}.bak" for name in parts]
    if (folder / case.out / "args.json").exists():
        names += [f"{case.out}/checkpoint/{name}" for name in (".DS_Store", "step-1.bak/x.txt")]
        names.append(f"{case.out}/.DS_Store")
    if (folder / case.out / "items").exists():
        names += [f"{case.out}/{name}" for name in (".DS_Store", "items/.DS_Store")]
    found = {}
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"not yours")
        found[name] = b"not yours"
        for parent in Path(name).parents[:-1]:
            found[str(parent)] = "folder"
    return found


def differences(wanted: dict, found: dict) -> str:
    """What is missing, left over or another, in a line; empty where nothing is."""
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"left over {name}" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        if wanted[name] != found[name]:
            faults.append(f"another {name}")
    return ", ".join(sorted(faults))


def finish(case: Case, folder: Path) -> str:
    """Runs the command again beside foreign files -> what is wrong then."""
    foreign = put_foreign(case, folder)
    ended = run(case.script, case.again, folder)
    if ended.status != 0:
        return f"the run after it ended with {ended.status}: {ended.errors[-500:]}"
    return differences(case.expected | foreign, contents(folder))


# 4. Points: one fault each -> what is wrong, or ""


def disturb(case: Case, work: Path, at: int, how: str) -> str:
    """A fault at an operation, then the same command again."""
    folder = case.fresh(work / f"{case.name}-{at}-{how}")
    ended = run(case.script, case.arguments, folder, Faults(folder, at, how))
    fault = ""
    if how in ("kill", "half") and ended.status != KILLED:
        fault = f"it ended with {ended.status}, not by the kill"
    if how == "full" and not one_line(ended):
        fault = f"a full disk: status {ended.status}, {ended.errors[-500:]!r}"
    if how in SIGNALS and ended.status not in (0, 128 + SIGNALS[how]):
        fault = f"status {ended.status}"
    if "Traceback" in ended.errors:
        fault = f"a traceback: {ended.errors[-500:]}"
    return fault or finish(case, folder)


def kill_ranks(case: Case, work: Path, at: int, how: str) -> str:
    """Two ranks, one killed; finished on 1 or 4. `how`: the rank that is killed, and the 1 or 4."""
    killed, later = map(int, how.split("-"))
    folder = case.fresh(work / f"{case.name}-{at}-ranks-{how}")
    faults = [Faults(folder), Faults(folder)]
    faults[killed] = Faults(folder, at, "kill")
    pids = start_ranks(case, case.arguments, folder, faults)
    first = wait(pids[killed], folder)
    other = pids[1 - killed]
    if first.status == KILLED:
        os.kill(other, signal.SIGKILL)  # as torchrun does
    wait(other, folder)
    if first.status not in (KILLED, 0):  # rank 1 may have fewer operations
        return f"it ended with {first.status}: {first.errors[-500:]}"
    return finish_ranks(case, folder, later)


def stop_ranks(case: Case, work: Path, at: int, how: str) -> str:
    """A signal that one of two ranks hears stops both after the step."""
    folder = case.fresh(work / f"{case.name}-{at}-stop-{how}")
    pids = start_ranks(case, case.arguments, folder, [Faults(folder, at, how), Faults(folder)])
    for pid in pids:
        ended = wait(pid, folder)
        if ended.status not in (0, 128 + SIGNALS[how]) or "Traceback" in ended.errors:
            return f"it ended with {ended.status}: {ended.errors[-500:]}"
    return finish_ranks(case, folder, 2)


def finish_ranks(case: Case, folder: Path, count: int) -> str:
    """`finish` on several ranks."""
    foreign = put_foreign(case, folder)
    for pid in start_ranks(case, case.again, folder, [Faults(folder) for _ in range(count)]):
        ended = wait(pid, folder)
        if ended.status != 0:
            return f"the run after it ended with {ended.status}: {ended.errors[-500:]}"
    return differences(rounded(case.expected | foreign), rounded(contents(folder)))


def rounded(found: dict) -> dict:
    """Numbers of training differ in their last bits by the number of ranks."""
    new = dict(found)
    for name, content in found.items():
        if name.endswith(".safetensors"):
            tensors = safetensors.torch.load(content)
            new[name] = {k: Near(x.flatten().tolist()) for k, x in tensors.items()}
        elif name.endswith("metrics.jsonl"):
            losses = [line.get("loss", line.get("valid_loss", 0)) for line in content]
            new[name] = [[line.get("step") for line in content], Near(losses)]
    return new


class Near(list):
    """A list that equals another whose numbers are within 1e-4 of its own."""

    def __eq__(self, other):
        same_length = len(self) == len(other)
        return same_length and all(abs(a - b) < 1e-4 for a, b in zip(self, other))

    def __ne__(self, other):
        return not self == other


def race(case: Case, work: Path, at: int, how: str) -> str:
    """A second process starts while the first one is at its operation `at`."""
    folder = case.fresh(work / f"{case.name}-{at}-race")
    ready, say_ready = os.pipe()
    go, say_go = os.pipe()
    first = start(case.script, case.arguments, folder, Faults(folder, at, "wait", (go, say_ready)))
    os.read(ready, 1)
    second = run(case.script, case.again, folder)
    os.write(say_go, b"x")
    first = wait(first, folder)
    for handle in (ready, say_ready, go, say_go):
        os.close(handle)
    if first.status != 0 or not one_line(second):
        told = f"{first.errors[-300:]!r}, {second.errors[-300:]!r}"
        return f"the two ended with {first.status} and {second.status}: {told}"
    return differences(case.expected, contents(folder))


def start_twice(case: Case, work: Path, at: int, how: str) -> str:
    """A second process starts `at` milliseconds after the first, wherever that is then."""
    folder = case.fresh(work / f"{case.name}-{at}-twice")
    first = start(case.script, case.arguments, folder, Faults(folder))
    time.sleep(at / 1000)
    second = wait(start(case.script, case.arguments, folder, Faults(folder)), folder)
    first = wait(first, folder)
    sound = [ended.status == 0 or one_line(ended) for ended in (first, second)]
    if 0 not in (first.status, second.status) or not all(sound):
        return f"{first.status} {first.errors[-300:]!r}, {second.status} {second.errors[-300:]!r}"
    return differences(case.expected, contents(folder))


def interrupt(case: Case, work: Path, at: int, how: str) -> str:
    """A signal `at` milliseconds after the script itself is started: it imports PyTorch then."""
    folder = case.fresh(work / f"{case.name}-{at}-interrupt-{how}")
    command = [sys.executable, str(ROOT / f"{case.script}.py"), *case.arguments]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=folder, **pipes)
    time.sleep(at / 1000)
    process.send_signal(SIGNALS[how])
    errors = process.communicate(timeout=PATIENCE_S)[1].decode()
    if process.returncode not in (0, -SIGNALS[how], 128 + SIGNALS[how]) or "Traceback" in errors:
        return f"it ended with {process.returncode}: {errors[-500:]}"
    return finish(case, folder)


def small_disk(case: Case, work: Path, at: int, how: str) -> str:
    """A disk of `at` KiB, which then grows."""
    folder = work / f"{case.name}-{at}-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={at}k", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        shutil.copytree(case.inputs, folder, dirs_exist_ok=True)
        ended = run(case.script, case.arguments, folder)
        if ended.status != 0 and not one_line(ended):
            return f"a full disk: status {ended.status}, {ended.errors[-500:]!r}"
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        return finish(case, folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def can_mount(work: Path) -> bool:
    """Whether this machine lets us have a small disk."""
    folder = work / "mount"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        return False
    return subprocess.run(["umount", str(folder)]).returncode == 0


# 5. The plan


def write_inputs(folder: Path) -> int:
    """A tiny model, its base, and data for each script."""
    conftest.write_tokenizer(folder / "model")
    shutil.copytree(folder / "model", folder / "base")  # the same vocabulary
    for i, name in enumerate(("model", "base")):
        conftest.write_model(folder / name, seed=i, **SIZE)
    pairs = [pair | {"id": f"p{i}"} for i, pair in enumerate(conftest.PAIRS[:5])]
    work = folder / "work"
    work.mkdir()
    conftest.write_jsonl(work / "pairs.jsonl", pairs)
    conftest.write_jsonl(work / "prompts.jsonl", [{"prompt": x["source"]} for x in pairs[:2]])
    choices = [{"prompt": x["source"], "choices": ["Yes.", "No."], "answer": 1} for x in pairs[:2]]
    conftest.write_jsonl(work / "choice.jsonl", choices)
    numeric = [{"question": x["source"], "answer": "#### 4"} for x in pairs[:2]]
    conftest.write_jsonl(work / "numeric.jsonl", numeric)
    safety = [{"prompt": x["source"], "harmful": x is pairs[0]} for x in pairs[:2]]
    conftest.write_jsonl(work / "safety.jsonl", safety)
    return 0


def make_cases(work: Path) -> list[Case]:
    """Each script, and training that is resumed."""
    pid = fork(lambda: write_inputs(work))
    assert os.waitpid(pid, 0)[1] == 0
    inputs = work / "work"
    model = ["--model", str(work / "model")]
    wrote = ["--max-new-tokens", "6", "--batch-size", "2"]
    answers = ["--data", "prompts.jsonl", "--out", "answers.jsonl", "--task", "answer"]
    base = ["--model", str(work / "base"), *answers, "--max-new-tokens", "6"]
    ended = run("generate", base, inputs)
    assert ended.status == 0, ended.errors
    rationales = [*model, "--data", "pairs.jsonl", "--out", "r.jsonl", *wrote, "--cue", "\\n"]
    ended = run("generate", [*rationales, "--out", "ledger.jsonl"], inputs)
    assert ended.status == 0, ended.errors
    train = [*model, "--data", "ledger.jsonl", "--valid", "v=pairs.jsonl", "--out", "tuned"]
    train += ["--batch-size", "2", "--max-steps", "4", "--learning-rate", "1e-3"]
    train += ["--save-every", "1", "--export-every", "2", "--valid-every", "2"]
    tests = [*model, "--out", "results", *wrote, "--translation", "pairs.jsonl"]
    for kind in ("choice", "numeric", "safety"):
        tests += [f"--{kind}", f"{kind}.jsonl"]
    tests += ["--drift", "answers.jsonl", "--base", str(work / "base")]
    resume = [*train, "--resume"]
    cases = [
        Case("generate", "generate", rationales, rationales, "r.jsonl", inputs),
        Case("train", "train", train, resume, "tuned", inputs),
        Case("evaluate", "evaluate", tests, tests, "results", inputs),
    ]
    for case in cases:
        case.measure(work)
    fresh = cases[1]
    stopped = fresh.fresh(work / "stopped")  # while it writes its third checkpoint
    third = [n for n, (name, path) in enumerate(fresh.trace, 1) if "/step-3.tmp/" in path]
    at = third[len(third) // 2]
    run("train", train, stopped, Faults(stopped, at, "kill"))
    resumed = Case("train --resume", "train", resume, resume, "tuned", stopped, fresh.expected)
    resumed.measure(work)
    return [*cases[:2], resumed, cases[2]]


def make_points(case: Case, work: Path, disks: bool) -> list[tuple]:
    """Every operation is a point; signals, ranks, races and small disks are a sample."""
    points = []
    for n, (name, _) in enumerate(case.trace, 1):
        points.append((disturb, case, work, n, "kill"))
        if name in ("write", "save", "send"):
            points.append((disturb, case, work, n, "half"))
            points.append((disturb, case, work, n, "full"))
        if n % 5 == 0:
            points += [(disturb, case, work, n, how) for how in SIGNALS]
    locked = [n for n, (_, path) in enumerate(case.trace, 1) if path.endswith(".lock")]
    for at in spread(range(locked[0] + 1, locked[-1]), 6):  # while the lock is held
        points.append((race, case, work, at, ""))
    for i, at in enumerate(spread(range(1, len(case.trace) + 1), 6)):
        points.append((kill_ranks, case, work, at, f"{i // 3}-{1 if i % 2 else 4}"))
        if case.script == "train" and at > locked[0]:  # the others end at once
            points.append((stop_ranks, case, work, at, "SIGTERM"))
    points += [(start_twice, case, work, ms, "") for ms in (0, 10, 30, 100, 300)]
    for ms in (300, 1000, 1700, 2400):
        points += [(interrupt, case, work, ms, how) for how in SIGNALS]
    if disks:
        least = pages(case.inputs) + 4
        most = least + sum(map(size_of, case.expected.values())) + 200
        points += [(small_disk, case, work, kib, "") for kib in spread(range(least, most), 12)]
    return points


def spread(numbers: range, count: int) -> list[int]:
    """`count` of the numbers, the first and the last among them."""
    return [numbers[i * (len(numbers) - 1) // (count - 1)] for i in range(count)]


def pages(folder: Path) -> int:
    """KiB that a folder takes on a disk of memory: whole pages for each file."""
    files = [f for f in folder.rglob("*") if f.is_file()]
    return sum(4 * -(-f.stat().st_size // 4096) for f in files)


def size_of(content) -> int:
    """KiB of a file's content, or of a folder."""
    return 4 * -(-len(content) // 4096) if isinstance(content, bytes) else 4


def carry_out(points: list[tuple], jobs: int, work: Path) -> list[tuple[tuple, str]]:
    """Runs points, each in a process of its own -> those that failed, and why."""
    waiting = list(enumerate(points))
    running = {}
    failed = []
    while waiting or running:
        while waiting and len(running) < jobs:
            i, (do, case, _, at, how) = waiting.pop(0)
            folder = work / f"point-{case.name}-{i}"
            folder.mkdir()

            def work_on(do=do, case=case, folder=folder, at=at, how=how) -> int:
                (folder / "fault").write_text(do(case, folder, at, how))
                return 0

            running[fork(work_on)] = i, folder
        pid, status = os.wait()
        i, folder = running.pop(pid)
        file = folder / "fault"
        fault = file.read_text() if status == 0 else "the test itself has failed"
        if fault:
            failed.append((points[i], fault))
        shutil.rmtree(folder, ignore_errors=True)
    return failed


def describe(point: tuple, fault: str) -> str:
    """A failure in a line, with the operation that was disturbed."""
    do, case, _, at, how = point
    operation = ""
    if do in (disturb, race):
        name, path = case.trace[at - 1]
        operation = f" ({name} {'/'.join(Path(path).parts[4:])})"
    return f"    {name_of(point)}{operation}: {fault}"


def name_of(point: tuple) -> str:
    do, case, _, at, how = point
    return f"{do.__name__} {case.name} {at} {how}".strip()


def main(args: argparse.Namespace) -> int:
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as folder:
        work = Path(folder).resolve()
        disks = can_mount(work)
        for case in make_cases(work):
            start = time.monotonic()
            points = make_points(case, work, disks)
            if args.only:
                points = [point for point in points if name_of(point) in args.only]
            if args.quick:
                points = [point for point in points if point[0] is not interrupt]
                points = random.Random(0).sample(points, 9)
            failed = carry_out(points, args.jobs, work)
            kinds = Counter(how if do is disturb else do.__name__ for do, _, _, _, how in points)
            counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
            told = f"{case.name}: {len(case.trace)} operations, {len(points)} points ({counts})"
            seconds = time.monotonic() - start
            print(f"{told}, {len(failed)} failed, {seconds:.0f} s", flush=True)
            for point, fault in failed:
                print(describe(point, fault))
            early = {Path(path).name for path in unflushed(case.trace)}
            for name in sorted(early):
                print(f"    renamed before it was flushed to the disk: {name}")
            wrong += len(failed) + len(early)
    return int(wrong > 0)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="a sample of the points")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="points at a time")
    p.add_argument("--only", nargs="+", help="these points, as a failure names them")
    sys.exit(main(p.parse_args()))
