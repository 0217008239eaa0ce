"""Plays adb, and a device that is this machine; the tests put it on the PATH.

The environment tells it what is wrong: FAKE_ADB_GONE names a file that, once there, means that the
device was unplugged; FAKE_ADB_OLD means that the device does not hand statuses over.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(words: list[str]) -> int:
    if words[:1] == ["-s"]:
        if words[1] != "board-1":
            print(f"error: device '{words[1]}' not found", file=sys.stderr)
            return 1
        words = words[2:]
    gone = os.environ.get("FAKE_ADB_GONE")
    if gone and Path(gone).exists():
        print("error: no devices/emulators found", file=sys.stderr)
        return 1
    verb, *rest = words
    if verb == "get-state":
        print("device")
        return 0
    if verb == "push":
        shutil.copyfile(rest[0], rest[1])
        print(f"{rest[0]}: 1 file pushed.")
        return 0
    if verb == "pull":
        shutil.copytree(rest[0], Path(rest[1]) / Path(rest[0]).name)
        return 0
    assert verb == "shell", words
    done = subprocess.run(["sh", "-c", rest[0]], check=False)
    return 0 if os.environ.get("FAKE_ADB_OLD") else done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
