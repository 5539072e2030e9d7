"""The notebooks' upkeep: badges and install cell, execution with stored outputs, and the check of both.

    python tests/notebooks.py                 write badges and install cells, the tables of chapters, the home picture
    python tests/notebooks.py 17_losses --run run a notebook, store its outputs, clean it
    python tests/notebooks.py --check         say what is wrong, change nothing (exit code 1 if anything is)
"""
import argparse
import base64
import hashlib
import json
import os
import re
import sys
import time
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
MAX_BYTES = 1_500_000
MAX_FIGURE = 150_000
# a folder of the machine that ran the notebook; /tmp/ alone is the name every machine has
LOCAL_PATH = re.compile(r"(?:(?:/(?:home|root|work|Users|tmp|private|var/folders|opt)/)|(?:[A-Z]:\\\\Users\\\\))\w")
NOISE = re.compile(r"\b\w*Warning:|\[A\x1b|it/s\]|s/it\]|\d+%\|")


def settings():
    "The facts in settings.ini."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def notebooks(names=()):
    "Paths of the named notebooks (number_name, with or without .ipynb), or of all, in order."
    every = sorted(p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts))
    if not names: return every
    wanted = {str(n).removeprefix("nbs/").removesuffix(".ipynb") for n in names}
    known = {str(p.relative_to(NBS).with_suffix("")): p for p in every}
    if missing := sorted(wanted - set(known)): raise SystemExit(f"no notebook {', '.join(missing)}; there are {', '.join(known)}")
    return [known[n] for n in sorted(wanted)]


def badges(path):
    "The Markdown of the Colab and Kaggle badges for one notebook."
    cfg, where = settings(), path.relative_to(ROOT).as_posix()
    blob = f"{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/{where}"
    return (f"[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{blob})\n"
            f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/{blob})")


def install():
    "The visible install cell: it does something on Colab and Kaggle only, and nothing while testing."
    return ("#| eval: false\nimport os, sys\n\n"
            'if "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ:\n'
            f"    %pip install -q {settings()['lib_name']}")


def default_exp(path):
    "The module that a numbered chapter is exported to, or None."
    m = re.fullmatch(r"\d+_(.+)", path.stem)
    return m[1] if m and path.parent == NBS else None


def head(path):
    "What stands after the title cell, as (cell type, source) pairs."
    cells = [("markdown", badges(path)), ("code", install())]
    return cells + ([("code", f"#| default_exp {default_exp(path)}\n#| hide")] if default_exp(path) else [])


def is_head(cell):
    "Whether a cell is one that `head` writes, in this or an older wording."
    src = "".join(cell["source"])
    return src.startswith(("[![Open In Colab]", "#| default_exp")) or ("KAGGLE_KERNEL_RUN_TYPE" in src and "%pip install" in src)


def set_head(nb, path):
    "Put the badges, the install cell and default_exp behind the title cell; returns whether anything changed."
    want = head(path)
    have = [(c["cell_type"], "".join(c["source"])) for c in nb["cells"][1:len(want) + 1]]
    rest = [c for c in nb["cells"][1:] if not is_head(c)]
    if have == want and len(nb["cells"]) == len(rest) + len(want) + 1: return False
    new = []
    for i, (kind, source) in enumerate(want, 1):
        # the id depends on the place alone: writing twice gives the same file
        cell = {"cell_type": kind, "id": hashlib.sha1(f"{path.stem}{i}".encode()).hexdigest()[:8], "metadata": {}, "source": source.splitlines(True)}
        new.append({**cell, "execution_count": None, "outputs": []} if kind == "code" else cell)
    nb["cells"] = [nb["cells"][0], *new, *rest]
    nb["metadata"]["kernelspec"] = KERNEL
    return True


def read(path): return json.loads(path.read_text(encoding="utf-8"))


def dumps(nb): return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def write(nb, path):
    "Write as nbdev_clean does, beside the file first."
    part = path.with_name(path.name + ".part")
    part.write_text(dumps(nb), encoding="utf-8")
    os.replace(part, path)


def cleaned(nb):
    "The notebook as nbdev_clean stores it (a copy)."
    from nbdev.clean import clean_nb
    nb = json.loads(json.dumps(nb))
    clean_nb(nb, allowed_metadata_keys=settings()["allowed_metadata_keys"].split())
    return nb


def run(path, timeout=600):
    "Execute a notebook in its own kernel, store the outputs, clean; returns the seconds it took."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, 4)
    skip = [c for c in nb.cells if c.cell_type == "code" and re.search(r"^#\|\s*(slow|gpu|net|eval:\s*false)", c.source, re.M)]
    kept = [(c, c.outputs) for c in skip]
    for c in skip: c.metadata["tags"] = ["skip-execution"]  # its stored output stays as it was
    began = time.perf_counter()
    NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    seconds = time.perf_counter() - began
    for c, outputs in kept: c.outputs = outputs
    write(cleaned(json.loads(nbformat.writes(nb))), path)
    return seconds


def chapters():
    "The numbered chapters as (number, module, title, subtitle, path)."
    for path in sorted(NBS.glob("[0-9]*_*.ipynb")):
        title, _, subtitle = "".join(read(path)["cells"][0]["source"]).strip().partition("\n\n> ")
        yield path.name.split("_")[0], default_exp(path), title.removeprefix("# "), subtitle.split("\n")[0], path


def chapter_table(prefix=""):
    "The table of chapters in Markdown, its links starting with `prefix`."
    rows = [f"| {n} | [{module}]({prefix}{path.name}) | {subtitle} |" for n, module, _, subtitle, path in chapters()]
    return "\n".join(["| | Chapter | What it does |", "|---|---|---|", *rows])


def home_picture():
    "The first picture that index.ipynb stores, as (file name, bytes), or None."
    for cell in read(NBS / "index.ipynb")["cells"] if (NBS / "index.ipynb").exists() else []:
        for out in cell.get("outputs", []):
            for kind in ("png", "jpeg"):
                if data := out.get("data", {}).get(f"image/{kind}"): return f"home.{kind}", base64.b64decode("".join(data))


def between(text, table):
    "`text` with what stands between the two marks replaced by `table`."
    return re.sub(r"(<!-- chapters[^>]*-->\n)(?:.*\n)?(<!-- /chapters -->)", lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S)


def copies():
    "What is repeated outside the notebooks, as {path: the bytes that should stand there}."
    readme, home = ROOT / "README.md", NBS / "index.ipynb"
    want = {readme: between(readme.read_text(encoding="utf-8"), chapter_table("nbs/")).encode()}
    if home.exists():
        nb = read(home)
        for cell in nb["cells"]:
            if cell["cell_type"] == "markdown": cell["source"] = between("".join(cell["source"]), chapter_table()).splitlines(True)
        want[home] = dumps(nb).encode()
    if picture := home_picture(): want[NBS / picture[0]] = picture[1]
    return want


def cell_faults(cell):
    "What is wrong with one cell's stored outputs."
    for out in cell.get("outputs", []):
        shown = json.dumps({k: v for k, v in out.get("data", {}).items() if not k.startswith("image/")}) + "".join(out.get("text", []))
        for kind, picture in out.get("data", {}).items():
            size = len(base64.b64decode("".join(picture))) if kind in ("image/png", "image/jpeg") else 0
            if size > MAX_FIGURE: yield f"a figure of {size / 1e3:.0f} kB, more than {MAX_FIGURE / 1e3:.0f} (smaller dpi, or JPEG for photographs)"
        if out["output_type"] == "error": yield f"an error in its output ({out['ename']})"
        if out.get("name") == "stderr": yield "something on stderr in its output"
        if m := LOCAL_PATH.search(shown): yield f"a local path in its output ({shown[m.start():m.start() + 40]!r})"
        if m := NOISE.search(shown): yield f"a warning or a progress bar in its output ({shown[max(0, m.start() - 20):m.end()]!r})"


def check(path):
    "Everything wrong with one notebook, one line each."
    nb = read(path)
    cells = nb["cells"]
    title = "".join(cells[0]["source"]).strip() if cells else ""
    if not re.fullmatch(r"# [^\n]+\n\n> [^\n]+(\n\n(- \w[^\n]*\n?)+)?", title): yield "the first cell must be '# Title', a blank line, '> one-line subtitle' and nothing else"
    if [(c["cell_type"], "".join(c["source"])) for c in cells[1:len(head(path)) + 1]] != head(path): yield "badges or install cell differ: run python tests/notebooks.py"
    code = [c for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    if not any(c.get("outputs") for c in code): yield "no stored output: run python tests/notebooks.py NAME --run"
    for i, cell in enumerate(cells):
        for fault in cell_faults(cell): yield f"cell {i}: {fault}"
    if path.stat().st_size > MAX_BYTES: yield f"{path.stat().st_size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6} MB"


def main(argv=None):
    "The command line; returns the exit code."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="number_name of a notebook (default: all)")
    parser.add_argument("--run", action="store_true", help="execute and store outputs")
    parser.add_argument("--check", action="store_true", help="only say what is wrong")
    args = parser.parse_args(argv)
    faults = 0
    for path in notebooks(args.names):
        if args.check:
            for fault in check(path): faults, _ = faults + 1, print(f"{path.relative_to(ROOT)}: {fault}")
            continue
        nb = read(path)
        if set_head(nb, path): write(nb, path); print(f"{path.relative_to(ROOT)}: badges and install cell written")
        if args.run: print(f"{path.relative_to(ROOT)}: ran in {run(path):.1f} s, {path.stat().st_size / 1e3:.0f} kB")
    for path, want in copies().items():
        if path.exists() and path.read_bytes() == want: continue
        if args.check: faults, _ = faults + 1, print(f"{path.relative_to(ROOT)}: not what the notebooks say: run python tests/notebooks.py")
        else: path.write_bytes(want); print(f"{path.relative_to(ROOT)}: written")
    return 1 if faults else 0


if __name__ == "__main__": sys.exit(main())
