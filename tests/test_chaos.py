"""A sample of tests/chaos.py; all of it is `make chaos`."""

import subprocess
import sys
from pathlib import Path


def test_a_run_that_is_killed_or_finds_the_disk_full_ends_in_the_same_bytes_when_run_again():
    """In a process of its own: the forks need a parent in which PyTorch has not computed yet."""
    file = Path(__file__).with_name("chaos.py")
    command = [sys.executable, str(file), "--quick", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
