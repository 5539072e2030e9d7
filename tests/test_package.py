"""The wheel and the sdist are complete, and the package works where the checkout is not."""
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from notebooks import ROOT, settings


def sources():
    "Relative paths of the files a clone would have (committed or about to be)."
    try: out = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # an unpacked sdist
        skip = {"build", "dist", "__pycache__", "_proc", "_docs", "runs"}
        return [p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file() and not skip & set(p.relative_to(ROOT).parts) and ".egg-info" not in str(p)]
    return [Path(line) for line in out.splitlines() if (ROOT / line).is_file()]


def build(kind, source, out):
    "Call setuptools' build hook in `source`; returns the file it made."
    code = f"from setuptools import build_meta; print('MADE', build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.split("MADE ")[-1].strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A folder with the wheel and the sdist, built from a copy: building must leave nothing in the checkout."
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in sources():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, source / path)
    return {"wheel": build("wheel", source, out), "sdist": build("sdist", source, out)}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "The wheel, unpacked where pip would put it; its dependencies come from this environment."
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, built["wheel"]], check=True, capture_output=True)
    return folder


def call(installed, cwd, *code):
    "Run Python outside the checkout with the installed wheel first on the path."
    env = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *code], cwd=cwd, env=env, capture_output=True, text=True)


def test_wheel_holds_every_file_of_the_package(built):
    names = set(zipfile.ZipFile(built["wheel"]).namelist())
    ours = {p.as_posix() for p in sources() if p.parts[0] == "radclip"}
    assert ours and ours <= names
    assert not [n for n in names if n.split("/")[0] in {"tests", "nbs", ".ci"}]
    assert any(n.endswith("licenses/LICENSE") or n.endswith("dist-info/LICENSE") for n in names)


def test_wheel_holds_recipes_and_the_small_model(built):
    wheel = zipfile.ZipFile(built["wheel"])
    sizes = {i.filename: i.file_size for i in wheel.infolist()}
    assert any(n.startswith("radclip/recipes/") and n.endswith(".yaml") for n in sizes)
    model = {n: s for n, s in sizes.items() if n.startswith("radclip/phantom_model/")}
    assert any(n.endswith("open_clip_config.json") for n in model) and any(n.endswith(".safetensors") for n in model)
    assert sum(model.values()) <= 5_000_000


def test_metadata_says_what_settings_say(built):
    wheel, cfg = zipfile.ZipFile(built["wheel"]), settings()
    meta = message_from_string(wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode())
    assert (meta["Name"], meta["Version"], meta["Requires-Python"]) == (cfg["lib_name"], cfg["version"], f">={cfg['min_python']}")
    required = meta.get_all("Requires-Dist")
    runtime = {r for r in required if "extra ==" not in r}
    assert runtime == set(cfg["requirements"].split())
    assert not [r for r in runtime if "<" in r or "==" in r], "an upper pin would replace what Colab has"
    assert not [r for r in runtime if r.startswith(("nbdev", "fastcore"))]
    assert set(meta.get_all("Provides-Extra")) == {"app", "dicom", "dev"}
    assert {f"Programming Language :: Python :: 3.{n}" for n in (11, 12, 13)} <= set(meta.get_all("Classifier"))
    entry = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "radclip = radclip.cli:main" in entry.replace("radclip=radclip", "radclip = radclip")
    assert "](nbs/" not in meta.get_payload(), "a relative link is dead on the package index"


def test_sdist_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built["sdist"]) as tar: tar.extractall(tmp_path, filter="data")
    source = next(tmp_path.iterdir())
    names = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    assert {p.as_posix() for p in sources() if p.parts[0] in {"radclip", "nbs", "tests"}} <= names
    again = build("wheel", source, tmp_path)
    crc = lambda wheel: {i.filename: i.CRC for i in zipfile.ZipFile(wheel).infolist() if not i.filename.endswith("RECORD")}
    assert crc(again) == crc(built["wheel"])


def test_installed_package_is_the_one_that_runs(installed, tmp_path):
    out = call(installed, tmp_path, "-c", "import radclip, radclip.cli, sys; print(radclip.__file__); print('torch' in sys.modules)")
    assert out.returncode == 0, out.stderr
    where, torch = out.stdout.split()
    assert Path(where).is_relative_to(installed) and torch == "False"


def test_installed_package_needs_no_nbdev_nor_fastcore(installed, tmp_path):
    modules = [p.stem for p in (installed / "radclip").glob("*.py") if not p.stem.startswith("_")]
    code = ("import sys, importlib\n"
            "class Refuse:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name.split('.')[0] in {'nbdev', 'fastcore', 'execnb'}: raise ImportError(name)\n"
            "sys.meta_path.insert(0, Refuse())\n"
            f"[importlib.import_module('radclip.' + m) for m in {modules}]")
    out = call(installed, tmp_path, "-c", code)
    assert out.returncode == 0, out.stderr[-2000:]


def test_installed_command_lists_packaged_recipes(installed, tmp_path):
    out = call(installed, tmp_path, "-c", "from radclip.cli import main; main(['recipes', '--json'])")
    assert out.returncode == 0, out.stderr
    assert {r["name"] for r in json.loads(out.stdout)} == {p.stem for p in (ROOT / "radclip" / "recipes").glob("*.yaml")}


def test_version_is_the_same_everywhere():
    sys.path.insert(0, str(ROOT))
    import radclip
    assert radclip.__version__ == settings()["version"]
    assert f"## {radclip.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
