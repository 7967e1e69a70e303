"""Rules of the code that no type checker knows: who may import whom, what is never called, what no name may say."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from orchestrator.study.load import load_study

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "search_spaces").glob("*.yaml"))


@cache
def sources() -> dict[str, ast.Module]:
    """Module name -> syntax tree, of all that is not a test or a benchmark."""
    found = {}
    for path in sorted(file for room in ("orchestrator", "trainables") for file in (ROOT / room).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(), str(path))
    return found


@cache
def imported(module: str) -> set[str]:
    """Every module that one names in an import, wherever it stands; `from a import b` names both a and a.b."""
    found = set()
    for node in ast.walk(sources()[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def within(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(f"{package}.")}


def reaches(module: str) -> set[str]:
    """All of our modules that importing one brings along."""
    found, todo = set[str](), [module]
    while todo:
        for name in imported(todo.pop()) & sources().keys():
            if name not in found:
                found.add(name)
                todo.append(name)
    return found


def importers(package: str) -> set[str]:
    return {module for module in sources() if within(imported(module), package)}


def test_there_is_something_to_look_at() -> None:
    for module in (
        "orchestrator.sweep",
        "orchestrator.study.schema",
        "trainables.config.trial",
        "trainables.training.loop",
        "trainables.data",
    ):
        assert module in sources()
    assert len(sources()) > 25
    assert imported("trainables.training.loop") >= {"torch", "trainables.training.forward", "trainables.models.build"}
    assert reaches("trainables.runtime.trial") >= {
        "trainables.training.loop",
        "trainables.config.trial",
        "trainables.losses.logits",
    }


# ------------------------------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize("package", ["orchestrator", "mlflow", "optuna", "ray.tune"])
def test_trainables_knows_nothing_of_there_being_more_than_one_trial(package: str) -> None:
    assert not [module for module in importers(package) if module.startswith("trainables")]


def test_a_trial_runs_without_ray_and_only_its_workers_know_ray_train() -> None:
    assert {module for module in importers("ray") if module.startswith("trainables")} == {
        "trainables.runtime.worker_group"
    }
    assert "trainables.runtime.worker_group" not in reaches("trainables.runtime.trial_attempt")


@pytest.mark.parametrize(
    ("package", "only"),
    [
        ("ray.train", "trainables.runtime.worker_group"),
        ("ray.tune", "orchestrator.scheduling.tune_runner"),
        ("optuna", "orchestrator.scheduling.optuna_sampler"),
        ("mlflow", "orchestrator.mlflow_sync"),
        ("matplotlib", "orchestrator.reporting.figures"),
        ("scipy", "orchestrator.analysis.statistics trainables.metrics.task_scores"),
        ("sklearn", "trainables.metrics.task_scores"),
        ("ruamel", "orchestrator.study.yaml_reader"),
        ("peft", "trainables.models.lora"),
        ("rouge_score", "trainables.metrics.rouge"),
    ],
)
def test_each_big_library_has_its_doors(package: str, only: str) -> None:
    assert importers(package) == set(only.split())


TIERS = (  # each may import those before it, never those after it; what is not named is bound by having no cycles
    {"trainables.config.value"},
    {"trainables.config.data", "trainables.config.models", "trainables.config.terms"},
    {"trainables.config.phase"},
    {"trainables.config.trial"},
    {"trainables.losses.logits", "trainables.training.schedules", "trainables.data.prepare", "trainables.data.batches"},
    {
        "trainables.models.build",
        "trainables.models.remap",
        "trainables.training.phase_graph",
        "trainables.storage.files",
        "trainables.evaluation.language_modelling",
    },
    {"trainables.training.loop"},
    {"trainables.runtime.trial"},
    {"trainables.runtime.trial_attempt"},
    {"trainables.runtime.worker_group"},
    {"orchestrator.study.schema"},
    {
        "orchestrator.scheduling.trials",
        "orchestrator.analysis.tables",
        "orchestrator.mlflow_sync",
        "orchestrator.analysis.verdicts",
    },
    {"orchestrator.scheduling.optuna_sampler", "orchestrator.report"},
    {"orchestrator.scheduling.scheduler", "orchestrator.scheduling.tune_runner"},
    {"orchestrator.sweep"},
)


def test_imports_go_one_way() -> None:
    rank = {module: number for number, tier in enumerate(TIERS) for module in tier}
    assert rank.keys() <= sources().keys()
    for module in rank:
        above = [name for name in reaches(module) if rank.get(name, 0) > rank[module]]
        assert not above, f"{module} reaches {', '.join(above)}"


def test_no_module_imports_itself_by_a_detour() -> None:
    assert not [module for module in sources() if module in reaches(module)]


def test_losses_know_only_the_spec_and_data_knows_no_model_and_no_phase() -> None:
    for module in sources():
        ours = within(imported(module), "trainables")
        if module.startswith("trainables.losses"):
            own = ("trainables.losses", "trainables.config")
            assert not [name for name in ours & sources().keys() if not name.startswith(own)], module
        if module.startswith("trainables.data"):
            own = ("trainables.data", "trainables.config", "trainables.storage.cache")
            assert not [name for name in ours & sources().keys() if not name.startswith(own)], module


@pytest.mark.parametrize("name", ["utils", "common", "registry", "constants", "helpers", "misc"])
def test_no_file_is_a_drawer(name: str) -> None:
    assert not [module for module in sources() if module.rsplit(".", 1)[-1].strip("_") == name]


# ------------------------------------------------------------------------------------------------------ never called


def calls() -> Iterator[tuple[str, str, dict[str, ast.expr], int]]:
    """(module, dotted name of what is called, keywords, line)."""
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield module, ast.unparse(node.func), {str(k.arg): k.value for k in node.keywords}, node.lineno


def test_no_code_comes_from_outside() -> None:
    seen = 0
    for module, _, keywords, line in calls():
        value = keywords.get("trust_remote_code")
        seen += value is not None
        assert value is None or (isinstance(value, ast.Constant) and value.value is False), f"{module}:{line}"
    assert seen >= 2


@pytest.mark.parametrize("package", ["pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"])
def test_nothing_that_runs_what_it_reads_is_imported(package: str) -> None:
    assert not importers(package)


def test_torch_loads_tensors_only_and_pretrained_weights_are_safetensors() -> None:
    loads = [(m, k, line) for m, name, k, line in calls() if name == "torch.load"]
    assert loads
    for module, keywords, line in loads:
        assert ast.unparse(keywords.get("weights_only", ast.Constant(None))) == "True", f"{module}:{line}"
    models = [(m, k, line) for m, name, k, line in calls() if name == "auto.from_pretrained"]
    assert models
    for module, keywords, line in models:
        assert ast.unparse(keywords.get("use_safetensors", ast.Constant(None))) == "True", f"{module}:{line}"


def test_no_text_is_run_and_yaml_is_read_without_tags() -> None:
    for module, name, keywords, line in calls():
        assert name not in ("eval", "exec", "os.system", "compile"), f"{module}:{line}"
        assert "shell" not in keywords, f"{module}:{line}"
        assert name != "YAML" or ast.unparse(keywords["typ"]) in ("'safe'", "'rt'"), f"{module}:{line}"


def test_no_port_is_open_to_others() -> None:
    for file in (f for room in ("orchestrator", "trainables") for f in (ROOT / room).rglob("*.py")):
        assert "0.0.0.0" not in file.read_text(), file


# -------------------------------------------------------------------------------------------------------------- names


PAPERS = re.compile(
    r"(?<![a-z])(dwt|ctcd|okd|ckd|pea|peakd|minillm|distillm|distilbert|tinybert)(?![a-z])", re.IGNORECASE
)


def words(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every identifier, and every text that is no docstring."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                yield name, line
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value, line


def test_no_code_knows_a_paper() -> None:
    """A paper is a file in search_spaces/, not a class and not a branch. Docstrings may cite."""
    assert PAPERS.search("if kind == 'dwt'") and PAPERS.search("okd_loss") and not PAPERS.search("appear, repeat")
    for module, tree in sources().items():
        found = [f"{module}:{line}: {word}" for word, line in words(tree) if PAPERS.search(word)]
        assert not found, found


def test_no_field_of_a_trial_is_dead() -> None:
    """Each is read somewhere: a field that nothing reads promises what is not kept."""
    read = set()
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.MatchClass):
                read.update(node.kwd_attrs)
    rooms = [importlib.import_module(name) for name in sources() if name.startswith("trainables.config.")]
    values = [
        v
        for room in rooms
        for v in vars(room).values()
        if isinstance(v, type) and issubclass(v, BaseModel) and v.__module__ == room.__name__
    ]
    assert len(values) > 20
    for value in values:
        dead = [name for name in value.model_fields if name not in read and name != "kind"]
        assert not dead, f"{value.__name__}: {dead}"


# ------------------------------------------------------------------------------------------------------------- studies


def profiles(file: Path) -> list[str | None]:
    return [None, *(YAML(typ="safe", pure=True).load(file) or {}).get("profiles", {})]


def test_there_are_studies() -> None:
    assert "smoke" in {file.stem for file in STUDIES}


@pytest.mark.parametrize(
    ("file", "profile"), [(f, p) for f in STUDIES for p in profiles(f)], ids=lambda v: getattr(v, "stem", v)
)
def test_every_study_loads_under_each_of_its_profiles(file: Path, profile: str | None) -> None:
    """Loading puts each end of each range into the trial and validates it."""
    study = load_study(file, profile)
    assert study.name == file.stem and study.question
    for arm in study.arms:
        lean = study.spec(arm=arm, seed=0).pruned()
        assert study.objective.phase in lean.phases
        assert study.objective.model in lean.phases[study.objective.phase].train


def test_the_readmes_studies_are_studies(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    whole, more = tmp_path / "whole.yaml", tmp_path / "more.yaml"
    whole.write_text(blocks[0])
    more.write_text(blocks[0] + blocks[1])
    assert list(load_study(whole).claims) == ["teacher_helps"] and len(load_study(more).vary) == 4
    value, parts = (YAML(typ="safe").load(block) for block in (blocks[0], blocks[2]))  # these are of a trial
    value["trial"] |= {"data": parts["data"], "phases": value["trial"]["phases"] | parts["phases"]}
    with (tuned := tmp_path / "tuned.yaml").open("w") as file:
        YAML().dump(value, file)
    assert load_study(tuned).each_of("finetune") == ("rte", "mine")
    whole.write_text(blocks[3])
    of_decoders = load_study(whole)
    assert list(of_decoders.claims) == ["teacher_helps", "own_replies_help"]
    assert of_decoders.spec(arm="taught", seed=0).pruned().models_of("distil") == ("teacher", "student")


def test_the_readmes_tree_names_every_module() -> None:
    tree = (ROOT / "README.md").read_text().rpartition("## The tree")[2]
    for module in sources():
        folder, _, name = module.partition(".")
        if "." not in name and name:  # what lies in losses/ and data/ stands under their names
            assert re.search(rf"\b{name}(\.py)?\b|\b{name}/", tree), f"{folder}/{name}.py is not in the README's tree"
