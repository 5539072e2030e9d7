"""The rules of the house (CONTRIBUTING.md), held by looking at the files themselves."""
import ast
import re
import shutil
import subprocess
import sys
import tokenize
from io import StringIO

import pytest
import yaml

import notebooks as house
from notebooks import NBS, ROOT

NOTEBOOKS = house.notebooks()
CHAPTERS = {house.default_exp(p): p for p in NOTEBOOKS if house.default_exp(p)}
MODULES = {p.stem: p for p in sorted((ROOT / "radclip").glob("*.py")) if not p.stem.startswith("_")}
ORDER = {name: int(path.name.split("_")[0]) for name, path in CHAPTERS.items()}
by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
by_module = pytest.mark.parametrize("name", MODULES)


def tree(name): return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def code_lines(src):
    "Numbers of the lines of a module that hold code: no blanks, comments, docstrings."
    docs = set()
    for node in ast.walk(ast.parse(src)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return [i for i, line in enumerate(src.splitlines(), 1) if line.strip() and not line.strip().startswith("#") and i not in docs]


def imported(name):
    "Modules of radclip that a module imports, at the top or inside functions."
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("radclip."))
        elif isinstance(node, ast.ImportFrom):
            full = ("radclip." + (node.module or "") if node.level else node.module or "").rstrip(".")
            if full == "radclip": yield from (a.name for a in node.names)
            elif full.startswith("radclip."): yield full.split(".")[1]


def public(name):
    "Public functions and classes of a module."
    return [node for node in tree(name).body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]


def comments(src): return {t.start[0] for t in tokenize.generate_tokens(StringIO(src).readline) if t.type == tokenize.COMMENT}


def test_every_chapter_is_a_module_and_the_other_way_round():
    assert CHAPTERS, "no chapters in nbs/"
    assert set(CHAPTERS) == set(MODULES)
    assert sorted(ORDER.values()) == list(range(len(ORDER))), "the chapters' numbers are not 0, 1, 2, …"
    assert not [p.name for p in NOTEBOOKS if re.fullmatch(r"\d+_index", p.stem)], "nbdev would make it the home page"
    assert (NBS / "index.ipynb").exists()


@by_module
def test_imports_come_from_lower_numbers(name):
    later = {m for m in imported(name) if m in ORDER and ORDER[m] >= ORDER[name]}
    assert not later, f"{name} imports later chapters: {sorted(later)}"
    unknown = {m for m in imported(name) if m not in MODULES and m not in {"__version__"}}
    assert not unknown, f"{name} imports what radclip does not have: {sorted(unknown)}"


def test_losses_import_nothing_of_ours(): assert not list(imported("losses"))


@by_module
def test_modules_are_short(name):
    lines = code_lines(MODULES[name].read_text(encoding="utf-8"))
    assert len(lines) <= 300, f"{len(lines)} lines of code: make it two chapters"


@by_module
def test_imports_are_plain_and_known(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom): assert "*" not in [a.name for a in node.names], f"line {node.lineno}: a wildcard import"
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {n.split(".")[0] for n in names} & {"nbdev", "fastcore", "execnb"}, f"line {node.lineno}: a development tool in the package"


@by_module
def test_public_names_are_documented(name):
    src = MODULES[name].read_text(encoding="utf-8")
    said, missing = comments(src), []
    for node in public(name):
        if not ast.get_docstring(node): missing.append(f"{node.name}: no docstring")
        if not isinstance(node, ast.FunctionDef): continue
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        lines = [a.lineno for a in args]
        for a in args:  # a comment on its line (or the line below, where the signature closes), and the line to itself
            if not said & {a.end_lineno, a.end_lineno + 1} or lines.count(a.lineno) > 1: missing.append(f"{node.name}({a.arg}): no comment of its own")
    assert not missing, "\n".join(missing)


@by_notebook
def test_notebook_is_tidy(path): assert not list(house.check(path))


@by_notebook
def test_notebook_is_stored_as_nbdev_cleans_it(path):
    pytest.importorskip("nbdev")
    assert path.read_text(encoding="utf-8") == house.dumps(house.cleaned(house.read(path))), f"run nbdev_clean --fname {path.relative_to(ROOT)}"


@by_notebook
def test_cells_are_short_and_of_one_kind(path):
    for i, cell in enumerate(house.read(path)["cells"]):
        src = "".join(cell["source"])
        if cell["cell_type"] != "code": continue
        assert not re.search(r"^\s*from .+ import \*", src, re.M), f"cell {i}: a wildcard import"
        assert not re.search(r"^#\s*\|\s*hide\b.*\n(?:.*\n)*\s*import fastcore", src, re.M), f"cell {i}: a reader on Colab has no fastcore"
        if not re.search(r"^#\s*\|\s*exports?\b", src, re.M): continue
        lines = [line for line in src.splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(lines) <= 40, f"cell {i}: an export cell of {len(lines)} lines"
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(src).body}
        assert kinds != {True, False}, f"cell {i}: imports and code in one export cell"


@by_notebook
def test_notebook_links_lead_somewhere(path):
    for i, cell in enumerate(house.read(path)["cells"]):
        if cell["cell_type"] != "markdown": continue
        for target in re.findall(r"\]\((?!https?:|#|mailto:|data:|attachment:)([^)#\s]+)", "".join(cell["source"])):
            assert (path.parent / target).exists(), f"cell {i}: a dead link to {target}"


def test_every_chapter_ends_with_a_link_to_the_next():
    order = sorted(CHAPTERS.values())
    for path, following in zip(order, [*order[1:], NBS / "index.ipynb"]):
        texts = ["".join(c["source"]) for c in house.read(path)["cells"] if c["cell_type"] == "markdown"]
        assert f"]({following.name})" in "".join(texts[-2:]), f"{path.name} does not end with a link to {following.name}"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if house.default_exp(p)], ids=lambda p: p.stem)
def test_module_is_what_its_notebook_exports(path, tmp_path):
    export = pytest.importorskip("nbdev.export")
    (tmp_path / "radclip").mkdir()
    export.nb_export(path, lib_path=tmp_path / "radclip")
    fresh, stored = (folder / "radclip" / f"{house.default_exp(path)}.py" for folder in (tmp_path, ROOT))
    # the headers name the notebook by a path relative to the module; everything else must be equal
    plain = lambda p: re.sub(r"^(# AUTOGENERATED.*|# %% .*)$", "", p.read_text(encoding="utf-8"), flags=re.M)
    assert plain(fresh) == plain(stored), "run nbdev_export"


def test_titles_differ():
    titles = [title for _, _, title, _, _ in house.chapters()]
    assert len(titles) == len(set(titles))


def test_tables_and_picture_are_what_the_notebooks_say():
    stale = [path.name for path, want in house.copies().items() if not path.exists() or path.read_bytes() != want]
    assert not stale, f"{stale}: run python tests/notebooks.py"


def site(): return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def hrefs(part):
    "Every href below a part of _quarto.yml, in order."
    if isinstance(part, dict): return ([part["href"]] if "href" in part else []) + [h for v in part.values() for h in hrefs(v)]
    return [h for v in part for h in hrefs(v)] if isinstance(part, list) else []


def test_sidebar_lists_every_notebook_in_order():
    listed = hrefs(site()["website"]["sidebar"])
    assert listed == ["index.ipynb", *[p.relative_to(NBS).as_posix() for p in NOTEBOOKS if p.stem != "index"]]


def test_site_links_exist():
    here = [h for h in hrefs(site()["website"]) if not h.startswith("http")]
    assert here and all((NBS / h).is_file() for h in here)
    assert (NBS / site()["format"]["html"]["css"]).is_file()


def test_site_stub_reads_the_top_level_file_last():
    stub = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
    assert stub["metadata-files"] == ["nbdev.yml", "../_quarto.yml"]
    assert site()["project"] == {"type": "website", "output-dir": house.settings()["doc_path"]}
    assert "metadata-files" not in site(), "a list inside the root file is not followed"
    assert "custom_quarto_yml" not in house.settings() and house.settings()["custom_sidebar"] == "True"


def test_site_preprocessing_keeps_titles_code_and_outputs(tmp_path):
    "What nbdev does before Quarto, on a copy (Quarto itself is no Python package)."
    pytest.importorskip("nbdev")
    sample = [NBS / "index.ipynb", *list(CHAPTERS.values())[::6], CHAPTERS["cli"]]
    (tmp_path / "nbs").mkdir()
    for path in [*sample, NBS / "_quarto.yml", NBS / "styles.css"]: shutil.copy2(path, tmp_path / "nbs" / path.name)
    for name in ("settings.ini", "_quarto.yml"): shutil.copy2(ROOT / name, tmp_path / name)
    code = "import nbdev.quarto as q; q.refresh_quarto_yml(); q.proc_nbs(n_workers=0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    proc = tmp_path / "_proc"
    assert (proc / "_quarto.yml").is_file() and (proc / "nbdev.yml").is_file() and (proc / "styles.css").is_file()
    assert (proc / ".." / "_quarto.yml").is_file(), "the stub's second file"
    for path in sample:
        before, after = house.read(path)["cells"], house.read(proc / path.relative_to(NBS))["cells"]
        title, _, subtitle = "".join(before[0]["source"]).strip().partition("\n\n> ")
        front = yaml.safe_load("".join(after[0]["source"]).strip().strip("-"))
        assert (front["title"], front["description"]) == (title.removeprefix("# "), subtitle.split("\n")[0])
        outputs = lambda cells: sum(len(c.get("outputs", [])) for c in cells)
        hidden = outputs([c for c in before if c["cell_type"] == "code" and re.search(r"^#\s*\|\s*hide\s*$", "".join(c["source"]), re.M)])
        assert outputs(after) == outputs(before) - hidden, f"{path.name}: outputs got lost"
        shown = "\n".join("".join(c["source"]) for c in after)
        assert not re.search(r"^#\|\s*default_exp", shown, re.M) and "%pip install" in shown
        for name in re.findall(r"^(?:def|class) [a-z]\w+", MODULES[house.default_exp(path)].read_text(encoding="utf-8"), re.M) if house.default_exp(path) else []:
            assert name in shown, f"{path.name}: {name} is not shown"


def test_import_is_light_and_has_the_version():
    code = "import sys, radclip; print(radclip.__version__, sorted({'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == f"{house.settings()['version']} []", out.stderr


def readme_block(heading):
    "The command lines of the first code block under a heading of the README."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"^## {heading}$.*?^```bash\n(.*?)^```", text, re.S | re.M)[1].splitlines()


def test_readme_has_the_two_commands_on_one_line_each():
    assert readme_block("Try it") == ["pip install . && radclip quickstart"]
    line, = readme_block("Test it")
    assert line.startswith('pip install -e ".[dev]" && python -m pytest && nbdev_test')


def test_workflows_pin_their_actions_and_run_the_same_steps():
    for path in (ROOT / ".github" / "workflows").glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        flow = yaml.safe_load(text)
        assert flow["jobs"]
        for used in re.findall(r"uses:\s*(\S+)", text): assert re.search(r"@(v\d+|[0-9a-f]{40})", used), f"{path.name}: {used} is not pinned"
    test = yaml.safe_load((ROOT / ".github/workflows/test.yaml").read_text(encoding="utf-8"))["jobs"]["test"]
    assert test["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert test["steps"][-1]["run"] == "bash .ci/run"


# ---- the rules themselves can fail: each checker is shown a fault

def planted(tmp_path, monkeypatch, **change):
    "A good notebook with one thing changed, where the checker looks for it."
    monkeypatch.setattr(house, "NBS", tmp_path / "nbs"), monkeypatch.setattr(house, "ROOT", tmp_path)
    monkeypatch.setattr(house, "settings", lambda: {"user": "u", "repo": "r", "branch": "main", "lib_name": "radclip"})
    path = tmp_path / "nbs" / "00_sample.ipynb"
    path.parent.mkdir(exist_ok=True)
    stream = {"output_type": "stream", "name": "stdout", "text": ["1\n"], **change.pop("output", {})}
    cells = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": [change.pop("title", "# Sample\n\n> What it is")]},
             {"cell_type": "code", "id": "b", "metadata": {}, "source": ["print(1)"], "outputs": [stream], "execution_count": None}]
    nb = {"cells": cells, "metadata": {"kernelspec": house.KERNEL}, "nbformat": 4, "nbformat_minor": 5}
    if change.pop("with_head", True): house.set_head(nb, path)
    house.write(nb, path)
    return path


@pytest.mark.parametrize("change, said", [
    ({}, None),
    ({"title": "# Sample"}, "first cell"),
    ({"title": "# Sample\n\n> What it is\n\nAnd a sentence that vanishes from the site."}, "first cell"),
    ({"with_head": False}, "badges"),
    ({"output": {"text": []}}, None),
    ({"output": {"text": ["saved to /home/someone/run\n"]}}, "local path"),
    ({"output": {"text": ["saved to /tmp/tmpabc123/run\n"]}}, "local path"),
    ({"output": {"name": "stderr"}}, "stderr"),
    ({"output": {"text": ["x.py:3: UserWarning: old\n"]}}, "warning"),
    ({"output": {"output_type": "display_data", "data": {"image/png": "A" * 200_004}}}, "a figure of 150 kB"),
    ({"output": {"output_type": "display_data", "data": {"image/png": "A" * 200_000}}}, None),
    ({"output": {"text": ["100%|#####| 3/3 [00:00<00:00, 99it/s]\n"]}}, "progress bar"),
])
def test_checker_finds_a_planted_fault(tmp_path, monkeypatch, change, said):
    found = list(house.check(planted(tmp_path, monkeypatch, **change)))
    assert (not found) if said is None else any(said in f for f in found), found


def test_writing_heads_twice_changes_nothing_and_mends_an_old_wording(tmp_path, monkeypatch):
    path = planted(tmp_path, monkeypatch)
    nb, before = house.read(path), path.read_text()
    assert not house.set_head(nb, path) and house.dumps(nb) == before
    nb["cells"][2]["source"] = ["#| eval: false\nimport os\nif 'KAGGLE_KERNEL_RUN_TYPE' in os.environ:\n    %pip install something"]
    assert house.set_head(nb, path) and house.dumps(nb) == before


def test_code_lines_counts_code_alone():
    assert len(code_lines('"""Doc."""\nimport os\n\n# why\ndef f(a, # one\n      b, # two\n     ): # three\n    "Doc."\n    return a\n')) == 5
