"Recipes: what they accept, what they refuse and how; variables, stand-ins, run folders."
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from radclip.contrastive import build_contrastive
from radclip.recipe import Recipe, Run, TrainConfig, changed_settings, clear_leftovers, find_run, list_recipes, load_recipe, new_run, of_task, unfinished_run, valid_keys

PACKAGED = ["phantom", "roco-vitb32-v1", "roco-vitb16-v2", "iuxray-resnet18-distilbert", "flickr8k-zeroshot", "flickr8k-margin",
            "biomedclip-zeroshot", "pubmedclip-zeroshot", "medpix", "flickr8k-mobilenet"]


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    for name in ("RADCLIP_DATA", "RADCLIP_WEIGHTS"): monkeypatch.delenv(name, raising=False)


def written(folder, **settings):
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def refused(*args, **how):
    with pytest.raises(ValueError) as error: load_recipe(*args, **how)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_all_packaged_recipes_are_there_and_described():
    assert set(PACKAGED) <= set(list_recipes()) and all(list_recipes().values())


@pytest.mark.parametrize("name", list_recipes())
def test_packaged_recipe_parses_and_its_stand_in_builds(name):
    if load_recipe(name, stand_in=None).task != "contrastive": return  # test_captioning builds those
    recipe = load_recipe(name, stand_in=True)
    assert name.startswith("phantom") or recipe.stand_ins_used
    small = recipe.model_dump()
    small["data"] |= dict(source="phantom:60", sizes=None)
    small["train"] |= dict(batch_size=8)
    _, task, data = build_contrastive(Recipe(**small), say=lambda line: None)
    if recipe.train.epochs == 0: assert len(data) == 0
    else:
        task.train_mode()
        loss = task.backward(next(iter(data.loader(0))), lambda loss: loss.backward())
        assert loss.isfinite() and any(p.grad is not None and p.grad.abs().sum() > 0 for p in task.model.parameters())
    assert 0 <= task.validate(data)["recall"] <= 1


@pytest.mark.parametrize("override, nearest", [("train.epoch=3", "train.epochs"), ("epochs=3", "train.epochs"), ("trian.lr=1", "train"),
                                               ("data.sauce=x", "data.source"), ("train.freeze.imag=all", "train.freeze.image"), ("model.vocabsize=9", "model.vocab_size")])
def test_unknown_key_names_the_nearest(override, nearest):
    said = refused("phantom", override)
    assert override.split("=")[0].split(".")[0] in said and f"did you mean {nearest}?" in said


def test_unknown_recipe_names_the_nearest():
    assert "did you mean phantom" in refused("phantm")
    assert "medpix" in refused("medpixx")


@pytest.mark.parametrize("override, said", [("train.epochs=three", "train.epochs"), ("train.epochs=-1", "train.epochs"), ("train.precision=fp8", "train.precision"),
                                            ("epochs", "write key=value"), ("train.epochs.x=1", "nothing inside"), ("train.lr=[1", "no valid YAML")])
def test_bad_values_are_one_line(override, said): assert said in refused("phantom", override)


def test_bad_files(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {epochs: 3")
    assert "no valid YAML" in refused(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1\n- 2\n")
    assert "holds a list" in refused(tmp_path / "b.yaml")
    assert "folder" in refused(written(tmp_path, name="../escape"))


def test_overrides_are_yaml_and_the_last_wins():
    recipe = load_recipe("phantom", "train.lr=1e-4", "train.epochs=2", "train.epochs=3", "data.sizes=null", "train.betas=[0.8, 0.9]", "data.columns={group: case}")
    assert (recipe.train.lr, recipe.train.epochs, recipe.data.sizes, recipe.train.betas, recipe.data.columns) == (1e-4, 3, None, (0.8, 0.9), {"group": "case"})


def test_short_forms(tmp_path):
    recipe = load_recipe(written(tmp_path, data="phantom:50", model="phantom"))
    assert recipe.name == "mine" and recipe.data.source == "phantom:50" and recipe.model.kind == "phantom"


def test_variables_expand(tmp_path, monkeypatch):
    file = written(tmp_path, data={"source": "jsonl:$RADCLIP_DATA/pairs.jsonl"}, train={"negatives": "${RADCLIP_DATA}/mined.parquet"})
    assert "$RADCLIP_DATA is not set" in refused(file)
    monkeypatch.setenv("RADCLIP_DATA", "/there")
    recipe = load_recipe(file)
    assert recipe.data.source == "jsonl:/there/pairs.jsonl" and recipe.train.negatives == "/there/mined.parquet"


def test_an_unset_variable_asks_for_the_stand_in_of_its_part_only(monkeypatch):
    recipe = load_recipe("medpix")
    assert recipe.data.source.startswith("phantom") and recipe.model.kind == "phantom" and len(recipe.stand_ins_used) == 2
    assert all("is not set" in note and "STAND-IN" in note for note in recipe.stand_ins_used)
    monkeypatch.setenv("RADCLIP_DATA", "/there")
    recipe = load_recipe("medpix")
    assert recipe.data.source == "jsonl:/there/medpix2/pairs.jsonl" and recipe.model.kind == "phantom" and len(recipe.stand_ins_used) == 1
    assert "RADCLIP_WEIGHTS is not set" in refused("medpix", stand_in=False)


def test_what_the_user_sets_is_never_replaced():
    recipe = load_recipe("medpix", "train.epochs=7", "data.source=phantom:90")
    assert recipe.train.epochs == 7 and recipe.data.source == "phantom:90" and recipe.stand_in.data == {}
    assert "$RADCLIP_WEIGHTS is not set" in refused("medpix", "model.embed_dim=64")  # who changes the model wants that model


def test_data_that_cannot_be_had_falls_back_loudly(tmp_path):
    settings = dict(data={"source": f"jsonl:{tmp_path}/none.jsonl"}, stand_in={"data": {"data.source": "phantom:60"}}, train={"epochs": 0})
    said = []
    recipe, _, data = build_contrastive(load_recipe(written(tmp_path, **settings)), say=said.append)
    assert recipe.data.source == "phantom:60" and "STAND-IN" in said[0] and "none.jsonl" in said[0] and recipe.stand_ins_used == said
    with pytest.raises(FileNotFoundError, match="none.jsonl"): build_contrastive(load_recipe(written(tmp_path, **settings), "stand_in={}"), say=said.append)


def test_a_recipe_survives_its_yaml(tmp_path):
    recipe = load_recipe("roco-vitb16-v2", "train.lr=3e-6")
    run = new_run(recipe, tmp_path)
    assert run.recipe == recipe and load_recipe(run.folder / "recipe.yaml") == recipe


def test_runs_that_start_in_one_second_get_folders_of_their_own(tmp_path):
    recipe = load_recipe("phantom")
    with ThreadPoolExecutor(8) as pool: runs = list(pool.map(lambda _: new_run(recipe, tmp_path), range(8)))
    assert len({run.folder for run in runs}) == 8
    assert all(run.folder.parent == tmp_path / "phantom" for run in runs)


def test_finding_runs(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="train one first"): find_run(out=tmp_path)
    first, second = (new_run(load_recipe("phantom"), tmp_path) for _ in range(2))
    other = new_run(load_recipe("flickr8k-zeroshot", stand_in=True), tmp_path)
    assert find_run(out=tmp_path).folder == other.folder and find_run("phantom", tmp_path).folder == second.folder
    assert find_run(first.folder).folder == first.folder and find_run(first) is first
    second.update(finished=True)
    assert unfinished_run("phantom", tmp_path).folder == first.folder
    first.update(finished=True)
    with pytest.raises(FileNotFoundError, match="no unfinished run of phantom"): unfinished_run("phantom", tmp_path)
    with pytest.raises(FileNotFoundError, match="no run at nowhere"): find_run("nowhere", tmp_path)
    with pytest.raises(FileNotFoundError, match="no recipe.yaml"): Run(tmp_path)
    os.rename(tmp_path, tmp_path.with_name("moved"))
    assert find_run(out=tmp_path.with_name("moved")).folder.name == other.folder.name  # latest.txt still says the old place
    os.rename(tmp_path.with_name("moved"), tmp_path)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_run(tmp_path, monkeypatch, name):
    run = new_run(load_recipe("phantom"), tmp_path)
    monkeypatch.chdir(run.folder)  # where "" would lead
    with pytest.raises(ValueError, match="the run has an empty name"): find_run(name, tmp_path)


def test_a_name_is_no_pattern(tmp_path):
    new_run(load_recipe("phantom"), tmp_path)
    for name in ("*", "ph?ntom", "[p]hantom"):
        with pytest.raises(FileNotFoundError, match="no run at"): find_run(name, tmp_path)
        with pytest.raises(FileNotFoundError, match="no unfinished run"): unfinished_run(name, tmp_path)


def test_the_nearest_recipe_or_all():
    assert "did you mean phantom or" in refused("fantom")
    far = refused("xyzzy")
    assert "did you mean" not in far and far.endswith("the recipes there are: " + ", ".join(list_recipes()))


def test_a_model_setting_that_would_be_ignored_is_refused():
    said = refused("phantom", "model.name=ViT-B-32")
    assert said == "recipe phantom: model: name is not read by kind phantom (by open_clip, transformers): leave it out, or set it to null"
    assert load_recipe("roco-vitb32-v1", "model.kind=phantom", "model.name=null", "model.pretrained=null").model.kind == "phantom"


def test_every_packaged_recipe_loads_with_and_without_its_stand_ins(monkeypatch):
    for name in ("RADCLIP_DATA", "RADCLIP_WEIGHTS"): monkeypatch.setenv(name, "/there")
    for name in list_recipes():
        for stand_in in (True, False):
            if not name.startswith("phantom") or not stand_in: assert load_recipe(name, stand_in=stand_in)


def test_leftovers_of_a_killed_writer_are_cleared(tmp_path):
    run = new_run(load_recipe("phantom"), tmp_path)
    whole = sorted(p.relative_to(run.folder) for p in run.folder.rglob("*"))
    for name in (".run.json.41-7", ".recipe.yaml.41-7", ".metrics.csv.41-7", "checkpoints/.last.ckpt.41", ".model-abc/config.json", ".model-abc-old/x"):
        (run.folder / name).parent.mkdir(exist_ok=True)
        (run.folder / name).write_text("half")
    for name in ("embeddings/.test.safetensors.9", ".metrics.json.9-1"): (run.folder / name).write_text("another command is writing this")
    clear_leftovers(run)
    left = sorted(p.relative_to(run.folder) for p in run.folder.rglob("*"))
    assert left == sorted([*whole, Path("embeddings/.test.safetensors.9"), Path(".metrics.json.9-1")])


def test_changed_settings_are_paths():
    a, b = load_recipe("phantom").model_dump(), load_recipe("phantom", "train.lr=0.5", "train.freeze.image=all").model_dump()
    assert {k: v[1] for k, v in changed_settings(a, b).items()} == {"train.lr": 0.5, "train.freeze.image": "all"}
    assert changed_settings(a, a) == {}


def test_every_key_can_be_listed():
    keys = valid_keys(Recipe)
    assert {"data.source", "train.freeze.image", "train.augment.rotate", "loss.name"} <= set(keys) and len(keys) == len(set(keys))
    assert set(k.removeprefix("train.") for k in keys if k.startswith("train.") and k.count(".") == 1) == set(TrainConfig.model_fields)


def test_a_task_brings_its_own_parts(tmp_path):
    assert of_task("contrastive", "recipe") is Recipe and of_task("contrastive", "build") is build_contrastive
    with pytest.raises(ValueError, match="no task 'contrastiv': did you mean contrastive?"): of_task("contrastiv", "recipe")
    (tmp_path / "odd.yaml").write_text("task: draw\n")
    with pytest.raises(ValueError, match="recipe odd: no task 'draw': there are contrastive"): load_recipe(tmp_path / "odd.yaml")
    with pytest.raises(ValueError, match="a recipe of another task has other settings"): load_recipe("phantom", "task=draw")
