"""Tests the rules of the code that no type checker knows: the order of imports, calls that are forbidden, sizes, words."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from docs.pages import COPIED, MADE
from orchestrator.study.load import load_study
from tests.support import words
from tests.support.field_reads import dead_fields
from tests.support.source_tree import (
    ROOT,
    TOP,
    calls,
    classes,
    cycle,
    files,
    functions,
    imported,
    importers,
    own,
    packages,
    parents,
    reaches,
    room,
    sources,
    within,
)


def test_there_is_something_to_look_at() -> None:
    assert len(sources()) > 50 and {*TOP, "orchestrator.study", "trainables.losses"} <= packages()
    assert "orchestrator.sweep" in sources()
    assert imported("trainables.training.loop") >= {"torch", "trainables.models.build"}
    assert reaches("trainables.runtime.trial") >= {"trainables.training.loop", "trainables.config.trial"}


# --------------------------------------------------------------------------------------------------------------- rooms

ROOMS = (  # the lowest first; a room may import those below it, and none beside it
    {"trainables.config"},
    {"trainables.storage"},
    {"trainables.metrics"},
    {"trainables.data", "trainables.losses", "trainables.models"},
    {"trainables.generation"},
    {"trainables.evaluation"},
    {"trainables.training"},
    {"trainables.runtime"},
    {"orchestrator.study"},
    {"orchestrator.analysis", "orchestrator.cluster"},
    {"orchestrator.scheduling"},
    {"orchestrator.planning", "orchestrator.reporting"},
    {"orchestrator"},  # the commands, and what they share
)


def test_every_package_is_a_room_or_lies_in_one() -> None:
    named = set.union(*ROOMS)
    rooms = {name for name in packages() if name.count(".") == 1} | {"orchestrator"}
    assert named == rooms
    assert {room(module) for module in sources()} <= named, "trainables/ has no modules directly in it"


def test_modules_import_their_own_room_and_those_below() -> None:
    level = {name: number for number, names in enumerate(ROOMS) for name in names}
    wrong = [
        f"{module} imports {name}"
        for module in sources()
        for name in own(module)
        if room(name) != room(module) and level[room(name)] >= level[room(module)]
    ]
    assert not wrong


def test_no_module_imports_itself_by_a_detour() -> None:
    assert not cycle({module: sorted(own(module)) for module in sources()})


@pytest.mark.parametrize("package", sorted(packages()))
def test_the_parts_of_a_package_have_no_circle(package: str) -> None:
    """Modules and packages that lie side by side: each package as one, with all that is in it."""
    length = package.count(".") + 2
    graph: dict[str, set[str]] = {}
    for module in within(sources(), package) - {package}:
        part = ".".join(module.split(".")[:length])
        others = {".".join(name.split(".")[:length]) for name in within(own(module), package) - {package}}
        graph.setdefault(part, set()).update(others - {part})
    assert not cycle({part: sorted(others) for part, others in graph.items()})


def test_no_command_imports_another_command() -> None:
    assert not [name for name in ("sweep", "report", "export", "store", "command") if importers(f"orchestrator.{name}")]


@pytest.mark.parametrize("package", ["orchestrator", "mlflow", "optuna", "ray.tune"])
def test_trainables_knows_nothing_of_there_being_more_than_one_trial(package: str) -> None:
    assert not within(importers(package), "trainables")


def test_a_trial_runs_without_ray() -> None:
    """What runs the workers of a trial knows Ray; an attempt at a trial does not bring it along."""
    knowing = within(importers("ray"), "trainables")
    assert knowing and {room(module) for module in knowing} == {"trainables.runtime"}
    assert not knowing & reaches("trainables.runtime.trial_attempt")


def test_losses_know_nothing_but_their_terms() -> None:
    for module in within(sources(), "trainables.losses"):
        assert {room(name) for name in own(module)} <= {"trainables.losses", "trainables.config"}, module


@pytest.mark.parametrize(
    ("package", "rooms"),
    [
        ("ray.train", "trainables.runtime"),
        ("ray.tune", "orchestrator.scheduling"),
        ("optuna", "orchestrator.scheduling"),
        ("mlflow", "orchestrator"),
        ("matplotlib", "orchestrator.reporting"),
        ("jinja2", "orchestrator.reporting trainables.data"),
        ("scipy", "orchestrator.analysis trainables.metrics"),
        ("statsmodels", "orchestrator.analysis"),
        ("sklearn", "trainables.metrics"),
        ("ruamel", "orchestrator.study"),
        ("peft", "trainables.models"),
        ("rouge_score", "trainables.metrics"),
    ],
)
def test_each_big_library_has_its_doors(package: str, rooms: str) -> None:
    """At most two modules in each of these rooms import a library; what is private of Ray has a module of its own."""
    doors = [module for module in importers(package) if not is_for_rays_internals(module)]
    assert {room(module) for module in doors} <= set(rooms.split())
    for name in rooms.split():
        assert len([module for module in doors if room(module) == name]) <= 2, doors


def is_for_rays_internals(module: str) -> bool:
    return module.rsplit(".", 1)[-1] == "ray_internals"


PRIVATE_OF_RAY = re.compile(r"ray(\.\w+)*\._(?!_)\w+(\.\w+)*|ray\.tune\.(execution|experiment)(\.\w+)*")


def test_all_that_is_private_of_ray_lies_in_one_module() -> None:
    assert len([module for module in sources() if is_for_rays_internals(module)]) == 1
    for module, tree in sources().items():
        chains = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        private = sorted(name for name in imported(module) | chains if PRIVATE_OF_RAY.fullmatch(name))
        assert not private or is_for_rays_internals(module), f"{module}: {private}"


@pytest.mark.parametrize("name", ["utils", "common", "registry", "constants", "helpers", "misc", "base"])
def test_no_file_is_a_drawer(name: str) -> None:
    assert not [module for module in sources() if module.rsplit(".", 1)[-1].strip("_") == name]


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("top", TOP)
def test_at_most_ten_modules_lie_directly_in_a_top_package(top: str) -> None:
    assert len([module for module in sources().keys() - packages() if parents(module) == [top]]) <= 10


def test_at_most_three_files_have_more_than_400_lines() -> None:
    long = {name: lines for name, file in files().items() if (lines := file.read_text().count("\n")) > 400}
    assert len(long) <= 3, long


def test_a_class_of_more_than_250_lines_says_because_of_what() -> None:
    for module, node in classes():
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        assert lines <= 250 or "because" in (ast.get_docstring(node) or ""), f"{module}.{node.name}: {lines} lines"


def test_functions_have_at_most_four_positional_parameters() -> None:
    """`self`, and the context of torch's own functions, aside."""
    found = []
    for module, node in functions():
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        if len(names) - (names[:1] in (["self"], ["cls"], ["ctx"])) > 4:
            found.append(f"{module}:{node.lineno}: {node.name}({', '.join(names)})")
    assert not found


# ------------------------------------------------------------------------------------------------------ never called


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
    models = [(m, k, line) for m, name, k, line in calls() if name == "start.kind.from_pretrained"]
    assert models
    for module, keywords, line in models:
        assert ast.unparse(keywords.get("use_safetensors", ast.Constant(None))) == "True", f"{module}:{line}"


def test_no_text_is_run_and_yaml_is_read_without_tags() -> None:
    for module, name, keywords, line in calls():
        assert name not in ("eval", "exec", "os.system", "compile"), f"{module}:{line}"
        assert "shell" not in keywords, f"{module}:{line}"
        assert name != "YAML" or ast.unparse(keywords["typ"]) in ("'safe'", "'rt'"), f"{module}:{line}"


# ------------------------------------------------------------------------------------------------------------ variants

PAPERS = re.compile(
    r"(?<![a-z])(dwt|ctcd|okd|ckd|pea|peakd|minillm|distillm|distilbert|tinybert|taid|gkd|skd|patient)(?![a-z])",
    re.IGNORECASE,
)


def texts(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yields every identifier, and every text that is no docstring, with its line."""
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
    """A paper is a file in search_spaces/, neither a class nor a branch. Docstrings may cite."""
    assert PAPERS.search("if kind == 'dwt'") and PAPERS.search("okd_loss") and not PAPERS.search("appear, repeat")
    found = [
        f"{m}:{line}: {text}" for m, tree in sources().items() for text, line in texts(tree) if PAPERS.search(text)
    ]
    assert not found


OF_TEXTS = tuple(
    [
        "endswith",
        "find",
        "index",
        "partition",
        "removeprefix",
        "removesuffix",
        "rpartition",
        "rsplit",
        "split",
        "startswith",
    ]
)


def data_kinds() -> set[str]:
    """Returns the full names of the kinds of data sets: values of the config (unions of them, too), and opened ones."""
    config = importlib.import_module("trainables.config.data")
    kinds = {name for name in vars(config) if re.search("Data$|Corpora|Corpus|Task|Instruct|Glue|Files|Hub|Docs", name)}
    opened = {
        f"{module}.{node.name}"
        for module, node in classes()
        if module.startswith("trainables.data.") and not re.search("^_|Error$|Batch$", node.name)
    }
    return {f"{config.__name__}.{name}" for name in kinds if not name.endswith("Columns")} | opened


def test_at_most_five_places_ask_which_kind_of_data_they_have() -> None:
    kinds = data_kinds()
    assert len(kinds) > 8
    found = []
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                asked |= {name.attr for name in ast.walk(node.args[1]) if isinstance(name, ast.Attribute)}
                known = {
                    name.rsplit(".", 1)[-1]
                    for name in kinds
                    if name in imported(module) or name.startswith(f"{module}.")
                }
                if asked & known:
                    found.append(f"{module}:{node.lineno}: {', '.join(sorted(asked & known))}")
    assert len(found) <= 5, found


def metric_names() -> set[str]:
    """Returns the names of all values of a class `Metric` that a module of trainables/metrics/ holds."""
    found = set[str]()
    for module in within(sources(), "trainables.metrics"):
        for value in vars(importlib.import_module(module)).values():
            held = value if isinstance(value, tuple | list | set | frozenset) else [value]
            held = value.values() if isinstance(value, dict) else held
            found |= {str(one.name) for one in held if type(one).__name__ == "Metric"}
    return found


def test_nothing_branches_on_the_name_of_a_metric() -> None:
    """Nor guesses from its ending: what differs between metrics is a field or a function of the metric."""
    names = metric_names()
    if not names:
        pytest.skip("trainables/metrics/ has no values of a class Metric")
    found = []
    for module in sources().keys() - within(sources(), "trainables.metrics"):
        for node in ast.walk(sources()[module]):
            parts: list[ast.AST] = []
            if isinstance(node, ast.Compare):
                parts = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
            elif isinstance(node, ast.MatchValue):
                parts = [node.value]
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in OF_TEXTS:
                parts = [part for argument in node.args for part in ast.walk(argument)]
            texts_in = {str(part.value) for part in parts if isinstance(part, ast.Constant)}
            guessed = {text for text in texts_in if text in ("_loss", "_accuracy", "loss", "accuracy", "rouge")}
            if texts_in & names or (guessed and isinstance(node, ast.Call)):
                found.append(f"{module}:{getattr(node, 'lineno', 0)}: {sorted(texts_in)}")
    assert not found


def test_a_phase_run_is_parsed_by_its_own_class_alone() -> None:
    """`finetune[rte]` is what a phase run is called in tables; its parts are fields."""
    own_modules = {module for module, node in classes() if node.name == "PhaseRun"}
    assert len(own_modules) == 1
    found = []
    for module, tree in sources().items():
        for node in ast.walk(tree):
            of: list[ast.expr] = []
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in OF_TEXTS:
                of = node.args
            elif isinstance(node, ast.Compare):
                of = [node.left]
            if any(isinstance(part, ast.Constant) and part.value in ("[", "]") for part in of):
                found.append(f"{module}:{node.lineno}: {ast.unparse(node)}")
    assert not [place for place in found if place.partition(":")[0] not in own_modules]


def test_no_field_of_a_trial_is_dead() -> None:
    """Each is read off a value that can have it: a field without effect is a false promise."""
    assert len([node for module, node in classes() if module.startswith("trainables.config.")]) > 20
    assert not dead_fields()


# --------------------------------------------------------------------------------------------------------------- words


def test_private_terms_are_not_ordinary_english() -> None:
    """The words stand in parts, since this file is searched, too."""
    text = '"""Says who|m; va|lid: a path of o|ne\'s own."""\nfrom orchestrator.slo|ts import x\nli|ve = lives = self._to|ld\n'
    found = {finding.word for finding in words.find(text.replace("|", ""), "some.py")}
    assert {word.replace("-", "") for word in ("who-m", "va-lid:", "one's- own", "li-ve", "_to-ld")} < found
    assert len(found) == 6
    text = '"""Lives and tolls; invalid: the one. orchestrator/study/slots.py"""\nclass Runs: ...\n'
    assert not words.find(text, "some.py")


def test_no_private_term_is_used() -> None:
    found = [str(finding) for finding in words.findings()]
    assert not found, "\n" + "\n".join(found)


def test_every_module_says_what_it_is_for() -> None:
    for name, tree in sources().items():
        text = ast.get_docstring(tree) or ""
        assert files()[name].name == "__init__.py" or (text and not text.startswith("TODO")), name


def test_names_of_tests_have_at_most_80_characters() -> None:
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            assert not isinstance(node, ast.FunctionDef) or len(node.name) <= 80, f"{file.name}: {node.name}"


def test_tests_lie_as_the_code_lies() -> None:
    rooms = {name.rsplit(".", 1)[-1] for names in ROOMS for name in names} - {"orchestrator"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders - {"commands", "benchmarks"} <= rooms


# ----------------------------------------------------------------------------------------------------------- documents

DOCUMENTS = ["CONTRIBUTING.md", "README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
PATH = re.compile(r"`((?:[\w.-]+/)*[\w.-]+(?:/|\.(?:py|md|yaml|sbatch|toml|j2|lock)))`")


@pytest.mark.parametrize("file", DOCUMENTS)
def test_every_path_that_a_document_names_exists(file: str) -> None:
    """Paths in backticks with a known ending or a slash at their end; those in a user's storage are of other kinds."""
    text = (ROOT / file).read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    named = [
        path
        for path in PATH.findall(text)
        if path.split("/")[0] in (*TOP, "tests", "docs", "benchmarks", "search_spaces")
    ]
    missing = [path for path in named if not (ROOT / path).exists()]
    pages = (*MADE, *COPIED.values()) if file.startswith("docs/") else ()  # of the site only
    missing += [link for link in links if link not in pages and not ((ROOT / file).parent / link).exists()]
    assert not missing


# ------------------------------------------------------------------------------------------------------------- studies

STUDIES = sorted((ROOT / "search_spaces").glob("*.yaml"))


def profiles(file: Path) -> list[str | None]:
    return [None, *(YAML(typ="safe", pure=True).load(file) or {}).get("profiles", {})]


def test_there_are_studies_with_profiles() -> None:
    assert "smoke" in {file.stem for file in STUDIES}
    assert profiles(ROOT / "search_spaces" / "dwt.yaml") == [None, "laptop", "gpu", "paper"]


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


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_study_has_a_header(file: Path) -> None:
    """Tells the paper, the question, the command, what it costs, and where it differs from the paper."""
    header = re.match(r"(# .*\n)+", file.read_text())
    assert header
    fields = re.findall(r"^# ([A-Z][a-z]+) ", header[0], re.MULTILINE)
    assert fields in (["Paper", "Question", "Command", "Cost", "Differs"], ["Question", "Command", "Cost"])
    assert f"python -m orchestrator.sweep search_spaces/{file.name}" in header[0]
    question = re.sub(r"\n# +", " ", header[0].partition("# Question  ")[2].partition("\n# Command")[0])
    assert question == load_study(file).question


NO_VERBS = ("this", "its", "as", "less", "always", "has", "is", "models", "tensors", "losses", "weights", "values")


@pytest.mark.parametrize("module", sorted(sources()))
def test_a_docstring_of_a_function_begins_with_a_verb(module: str) -> None:
    for node in ast.walk(sources()[module]):
        if not isinstance(node, ast.FunctionDef) or any("property" in ast.unparse(d) for d in node.decorator_list):
            continue
        word = (ast.get_docstring(node) or "Returns").split()[0].strip(".,;:")
        is_verb = word[0].isupper() and word.endswith("s") and word.lower() not in NO_VERBS
        assert is_verb, (
            f"{module}:{node.lineno}: {node.name}: begins with {word!r}; expected what it does: Returns, Reads …"
        )
