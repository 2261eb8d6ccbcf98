"""Every module is imported, and one output has one process, without what only POSIX has: as on Windows, with a stand-in for its locks."""

from __future__ import annotations

import pytest

import fresh

# Third-party packages are imported before as they are; ours are given what Windows has. The stand-in locks one byte as Windows does.
CODE = """
import builtins, fcntl, importlib, json, os, pkgutil, sys, types
from pathlib import Path

ABSENT = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline", "syslog", "posix"}
folder = Path(sys.argv[1])

def locking(handle, mode, number):
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, number, os.lseek(handle, 0, os.SEEK_CUR))
    except BlockingIOError as error:
        raise PermissionError(13, "Permission denied") from error

sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
os.O_BINARY = os.O_NOINHERIT = 0
real = builtins.__import__

def guarded(name, globals=None, *rest):
    if globals and str(globals.get("__name__")).startswith("regraft") and name.partition(".")[0] in ABSENT:
        raise ImportError(f"{globals['__name__']} imports {name}, which Windows lacks")
    return real(name, globals, *rest)

builtins.__import__ = guarded
sys.platform = "win32"
importlib.import_module("regraft.platforms")
sys.platform = "linux"  # other packages would take Windows' own ways
import regraft
posix_only = {name: getattr(os, name) for name in ("fork", "pread", "pwrite", "O_NOFOLLOW", "O_CLOEXEC", "getuid", "sched_getaffinity")}
for name in posix_only:
    delattr(os, name)
failed = []
for module in pkgutil.walk_packages(regraft.__path__, "regraft."):
    if not module.name.endswith("__main__") and ".nemotron_nas_config" not in module.name:
        try:
            importlib.import_module(module.name)
        except Exception as error:
            failed.append(f"{module.name}: {error}")

from regraft import claims, platforms
from regraft.atomic import atomic_folder
from regraft.claims import claimed
from regraft.errors import OutputError
assert platforms.WINDOWS
with atomic_folder(folder / "out") as partial:
    (partial / "file").write_text("whole")
with claimed(folder / "busy"):
    for name, value in posix_only.items():
        setattr(os, name, value)
    child = os.fork()
    if child == 0:
        claims._held.clear()  # of the parent, not of a new process
        try:
            with claimed(folder / "busy"):
                os._exit(0)
        except OutputError as error:
            os._exit(7 if "is in use by process" in str(error) else 8)
    second = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
with claimed(folder / "busy"):
    pass
print(json.dumps({"failed": failed, "second": second, "left": sorted(path.name for path in folder.rglob("*"))}))
"""


@pytest.mark.long
def test_every_module_imports_and_locks_without_what_only_posix_has(tmp_path: object) -> None:
    done = fresh.run(["-c", CODE, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '{"failed": [], "second": 7, "left": ["file", "out"]}'
