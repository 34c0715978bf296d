"""Renders each folder of deploy/ that is a kustomization: manifests.py KUBECTL FOLDER. The folder gets NAME.yaml of
each, and high-availability-NAME.yaml of high-availability on another base. Needs PyYAML, which tools/python.sh brings."""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import yaml

root = pathlib.Path(__file__).parent.parent
# The first with `patches` and with folders among the `resources`.
FIRST = 21
# What ../high-availability builds on, by the one line that its comment says, beside the base.
BASES = ["keda", "hpa", "hpa-cert-manager", "hpa-object"]


def with_each_base(folder):
    """Adds a copy of high-availability for each other folder that it may build on."""
    for base in BASES:
        copy = folder / f"high-availability-{base}"
        shutil.copytree(folder / "high-availability", copy)
        path = copy / "kustomization.yaml"
        text = path.read_text()
        assert text.count("- ../base\n") == 1, text
        path.write_text(text.replace("- ../base\n", f"- ../{base}\n"))


def for_old_kubectl(folder):
    """Rewrites the kustomizations for the kustomize 2.0.3 in kubectl before 1.21, such as Debian 12's. It reads a
    folder as one of `bases`, and names patches otherwise."""
    for path in folder.glob("*/kustomization.yaml"):
        kustomization = yaml.safe_load(path.read_text())
        resources = kustomization.pop("resources")
        kustomization["bases"] = [r for r in resources if (path.parent / r).is_dir()]
        kustomization["resources"] = [r for r in resources if not (path.parent / r).is_dir()]
        for patch in kustomization.pop("patches", []):
            if isinstance(yaml.safe_load((path.parent / patch["path"]).read_text()), list):
                kustomization.setdefault("patchesJson6902", []).append(patch)
            else:
                kustomization.setdefault("patchesStrategicMerge", []).append(patch["path"])
        path.write_text(yaml.safe_dump(kustomization))


def without_deleted(text):
    """Removes the objects that the old kustomize only marks as deleted, where it does not know their types."""
    return yaml.safe_dump_all(d for d in yaml.safe_load_all(text) if d.get("$patch") != "delete")


def render(kubectl, target):
    said = subprocess.run([kubectl, "version", "--client"], capture_output=True, text=True, check=True).stdout
    minor = int(re.search(r'(?:v1\.|Minor:")([0-9]+)', said).group(1))
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as copy:
        deploy = pathlib.Path(copy) / "deploy"
        shutil.copytree(root / "deploy", deploy)
        with_each_base(deploy)
        if minor < FIRST:
            for_old_kubectl(deploy)
        for path in sorted(deploy.glob("*/kustomization.yaml")):
            name = path.parent.name
            done = subprocess.run([kubectl, "kustomize", str(path.parent)], capture_output=True, text=True)
            if done.returncode != 0 or (minor >= FIRST and done.stderr):
                sys.exit(f"manifests.py: kubectl kustomize of {name} failed: {done.stderr}")
            text = done.stdout if minor >= FIRST else without_deleted(done.stdout)
            (target / f"{name}.yaml").write_text(text)
            print(f"rendered by kubectl 1.{minor}: {name}")


if __name__ == "__main__":
    render(sys.argv[1], pathlib.Path(sys.argv[2]))
