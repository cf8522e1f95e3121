"""Python in a process that has imported nothing yet but what `conftest.py` makes up for."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(code, *arguments):
    """Standard output of the code, which must not fail; `arguments` are its `sys.argv[1:]`."""
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", f"import conftest\n{code}", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
