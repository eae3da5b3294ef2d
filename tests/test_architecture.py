"""The laws of the source tree, checked on its syntax trees: who may import whom, one door for each heavy
dependency, errors that explain themselves, sections that are strict, sizes, names, and what no file may hold.

The tables here are the documentation of those laws. An exception is a row with its reason.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

from tests.support.source_tree import (
    PACKAGES,
    ROOT,
    Module,
    called_name,
    classes,
    enclosing,
    fail_with,
    find_cycle,
    functions,
    imports,
    modules,
    own_module,
    test_modules,
    tracked_files,
)

# Which siblings a package may import; and the single modules that may import more.
SIBLINGS: dict[str, set[str]] = {"launcher": set(), "data_pipeline": set(), "solomonov": {"data_pipeline"}}
COMPOSITION_ROOTS = {f"solomonov.{name}": {"launcher"} for name in ("cli", "supervise", "jobs")}

# Heavy dependency -> the one module a package that imports it, inside functions only.
DOORS: dict[str, set[str]] = {
    "deepspeed": {"solomonov/engine.py", "solomonov/stages.py", "solomonov/distributed.py"},
    "tensorboard": {"solomonov/tensorboard.py"},
    "transformers": {"solomonov/export.py"},
    "tokenizers": {"solomonov/fast_tokenizer.py"},
    "matplotlib": {"solomonov/pictures.py"},
    "sentencepiece": {"data_pipeline/tokenizer.py"},
    "webdataset": {"data_pipeline/shards.py"},
    "ray": {"launcher/ray_door.py", "data_pipeline/cluster.py"},
}
# What goes into exports as it is: it stands alone, and nothing of ours imports it.
GIVEN_AWAY = {f"solomonov/{name}_solomonov.py" for name in ("modeling", "layers", "configuration")}
GIVEN_AWAY_NEEDS = {"torch", "transformers", *sys.stdlib_module_names}
ALIASES = {"torch.utils.tensorboard": "tensorboard"}  # other names of the same dependency
HEAVY_AT_START = {"torch", *DOORS}  # absent from sys.modules after `solomonov --help`

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
LONG_FILES: dict[str, str] = {  # file -> reason
    "tests/solomonov/checkpoint/test_checkpointer.py": "one file a module, and most faults of a save meet in this one",
}
LONG_FUNCTIONS: dict[str, str] = {}  # file:function -> reason
BROAD_EXCEPTS: dict[str, str] = {}  # file:function -> reason; a handler that ends in a bare `raise` needs none

MESSAGE_PARTS = {"got", "rule", "remedy"}
BARE_RAISES_ALLOWED = {"StopIteration", "KeyboardInterrupt"}  # they are signals, not messages


def own_error_names() -> set[str]:
    return {item.name for module in modules() if module.path.name == "errors.py" for item in classes(module)}


# --- imports -----------------------------------------------------------------------------------------------


def test_siblings_are_imported_only_along_the_table() -> None:
    wrong = []
    for module in modules():
        allowed = {module.package} | SIBLINGS[module.package] | COMPOSITION_ROOTS.get(module.name, set())
        for item in imports(module):
            top = item.target.partition(".")[0]
            if top in PACKAGES and top not in allowed:
                wrong.append(f"{module.file}:{item.line} imports {item.target}")
            if top == "tests":
                wrong.append(f"{module.file}:{item.line} imports the tests")
    fail_with(wrong, "an import that the table SIBLINGS does not allow")


def test_own_imports_name_something_that_exists() -> None:
    wrong = [
        f"{module.file}:{item.line} imports {item.target}"
        for module in modules()
        for item in imports(module)
        if item.target.partition(".")[0] in PACKAGES and own_module(item.target) is None
    ]
    fail_with(wrong, "no such module of ours")


def test_no_cycle_between_modules() -> None:
    edges: dict[str, set[str]] = {module.name: set() for module in modules()}
    for module in modules():
        for item in imports(module):
            target = own_module(item.target)
            if target is not None and target != module.name and not item.for_types_only:
                edges[module.name].add(target)
    assert not (cycle := find_cycle(edges)), "modules import each other in a circle: " + " -> ".join(cycle)


def test_each_heavy_dependency_has_one_door_and_opens_it_lazily() -> None:
    wrong, used = [], set()
    for module in modules():
        if module.file in GIVEN_AWAY:
            continue
        for item in imports(module):
            parents = [item.target.rsplit(".", cut)[0] for cut in range(item.target.count(".") + 1)]
            name = next((ALIASES[parent] for parent in parents if parent in ALIASES), parents[-1])
            if name not in DOORS or item.for_types_only:
                continue
            used.add((name, module.file))
            if module.file not in DOORS[name]:
                wrong.append(f"{module.file}:{item.line} imports {name}, its door is {sorted(DOORS[name])}")
            elif not item.inside_function:
                wrong.append(f"{module.file}:{item.line} imports {name} at module level")
    for name, files in DOORS.items():
        wrong += [f"the door {file} does not import {name}" for file in sorted(files) if (name, file) not in used]
    fail_with(wrong, "heavy dependencies are imported by their door, inside functions")


def test_what_goes_into_exports_stands_alone() -> None:
    wrong, seen = [], set()
    names = {file.removesuffix(".py").replace("/", ".") for file in GIVEN_AWAY}
    for module in modules():
        for item in imports(module):
            within = item.target.rpartition(".")[0] in names or item.target in names
            if module.file in GIVEN_AWAY:
                seen.add(module.file)
                if item.target.partition(".")[0] not in GIVEN_AWAY_NEEDS and not within:
                    wrong.append(f"{module.file}:{item.line} imports {item.target}")
            elif within:
                wrong.append(f"{module.file}:{item.line} imports {item.target}")
    wrong += [f"{file} is not there" for file in sorted(GIVEN_AWAY - seen)]
    fail_with(wrong, "what goes into exports imports torch and transformers alone, and nothing of ours imports it")


def test_every_import_is_declared_in_pyproject() -> None:
    declared = set(sys.stdlib_module_names) | set(PACKAGES)
    names = {"PyYAML": "yaml"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in project["dependencies"]:
        name = re.split(r"[^A-Za-z0-9_.-]", requirement)[0]
        declared.add(names.get(name, name))
    declared |= DOORS.keys()  # ray and matplotlib are optional: their doors say what to install
    wrong = [
        f"{module.file}:{item.line} imports {item.target}"
        for module in modules()
        for item in imports(module)
        if item.target.partition(".")[0] not in declared
    ]
    fail_with(wrong, "an import that pyproject.toml does not declare")


@pytest.mark.parametrize(
    "statement",
    [
        "sys.argv = ['solomonov', '--help']; from solomonov.cli import main; main()",
        "import solomonov, solomonov.cli",
        "import launcher",
        "import data_pipeline",
    ],
)
def test_start_imports_nothing_heavy(statement: str) -> None:
    code = f"""import sys
try:
    {statement}
except SystemExit as leave:
    assert not leave.code, leave.code
heavy = sorted({HEAVY_AT_START!r} & sys.modules.keys())
print("heavy:", heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy: []\n"), f"{statement!r} imports {done.stdout.splitlines()[-1]}"


def test_data_pipeline_reads_no_environment_and_no_torch() -> None:
    wrong = []
    for module in modules():
        if module.package != "data_pipeline":
            continue
        wrong += [
            f"{module.file}:{item.line} imports torch"
            for item in imports(module)
            if item.target.partition(".")[0] == "torch"
        ]
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
                wrong.append(f"{module.at(node)} reads {ast.unparse(node)}")
    wrong += [
        f"{module.file}:{item.line} imports {item.target}"
        for module in modules()
        if module.package == "data_pipeline"
        for item in imports(module)
        if item.target in ("os.environ", "os.getenv")
    ]
    fail_with(wrong, "data_pipeline takes what it needs as arguments")


def test_only_the_launcher_knows_slurm() -> None:
    word = "SLURM" + "_"
    wrong = [
        f"{path.relative_to(ROOT)}"
        for path in tracked_files()
        if path.relative_to(ROOT).parts[0] in ("solomonov", "data_pipeline", "configs")
        and word in path.read_text(encoding="utf-8", errors="replace")
    ]
    fail_with(wrong, f"{word} occurs outside launcher/ and slurm/")


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_errors_docstring_draws_the_tree_of_its_classes(package: str) -> None:
    module = importlib.import_module(f"{package}.errors")
    drawn: dict[str, tuple[int, int | None]] = {}
    for indent, name, code in re.findall(r"^( *)[*+] (\w+)(?: +(\d+))?", module.__doc__ or "", re.MULTILINE):
        drawn[name] = (len(indent) // 2, int(code) if code else None)
    real = {
        name: item
        for name, item in vars(module).items()
        if isinstance(item, type) and item.__module__ == module.__name__
    }
    assert drawn.keys() == real.keys(), f"{package}/errors.py: the docstring's tree and the classes differ"
    for name, (depth, code) in drawn.items():
        inheritance = len([parent for parent in real[name].__mro__ if parent in real.values()]) - 1
        assert depth == inheritance, f"{name} is drawn {depth} levels deep and is {inheritance} deep"
        expected = real[name].exit_code
        assert code is None or code == expected, f"{name} is drawn with exit code {code}, has {expected}"
        assert code is not None or depth == 0, f"{name} is drawn without its exit code"


def test_errors_of_ours_say_what_got_rule_remedy_with_a_value() -> None:
    names, wrong, seen = own_error_names(), [], 0
    for module in modules():
        for node in ast.walk(module.tree):
            if not (isinstance(node, ast.Call) and called_name(node) in names):
                continue
            seen += 1
            keywords = {keyword.arg for keyword in node.keywords}
            if keywords - {"what"} != MESSAGE_PARTS or (len(node.args) != 1 and "what" not in keywords):
                wrong.append(f"{module.at(node)} {called_name(node)} needs what, got, rule, remedy")
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            if all(isinstance(value, ast.Constant) for value in values):
                wrong.append(f"{module.at(node)} {called_name(node)} names no value that was met")
    assert seen, "found no call of an error class: this test looks in the wrong place"
    fail_with(wrong, "an error says what is wrong, what was got, the rule, and the remedy, with values")


def raised_names(module: Module) -> Iterator[tuple[ast.Raise, str, bool]]:
    """(statement, class name, has a message) of every raise of a class, not of a caught variable."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            if isinstance(node.exc, ast.Call):
                yield node, called_name(node.exc), bool(node.exc.args or node.exc.keywords)
            elif isinstance(node.exc, ast.Name):
                yield node, node.exc.id, False


def test_no_anonymous_error_is_raised() -> None:
    wrong = []
    for module in modules():
        for node, name, has_message in raised_names(module):
            kind = getattr(builtins, name, None)
            if not (isinstance(kind, type) and issubclass(kind, BaseException)):
                continue
            if name in ("Exception", "BaseException", "NotImplementedError"):
                wrong.append(f"{module.at(node)} raises {name}")
            elif not has_message and name not in BARE_RAISES_ALLOWED:
                wrong.append(f"{module.at(node)} raises {name} without a message")
    fail_with(wrong, "raise an error that can be told from others and says why")


def test_no_broad_except() -> None:
    wrong, found = [], set()
    for module in modules():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            last = node.body[-1]
            caught = "" if node.type is None else ast.unparse(node.type)
            broad = not caught or re.search(r"\b(Base)?Exception\b", caught)
            if not broad or (isinstance(last, ast.Raise) and last.exc is None):
                continue
            place = f"{module.file}:{enclosing(module, node)}"
            found.add(place)
            if place not in BROAD_EXCEPTS:
                wrong.append(f"{module.at(node)} in {place}: except {caught}")
    wrong += [f"{place} stands in BROAD_EXCEPTS and has none" for place in BROAD_EXCEPTS.keys() - found]
    fail_with(wrong, "catch what can be named")


def test_every_assert_has_a_message() -> None:
    wrong = [
        module.at(node)
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Assert) and node.msg is None
    ]
    fail_with(wrong, "an assert without a message")


# --- what no code path may do ------------------------------------------------------------------------------


def test_nothing_that_is_read_can_execute() -> None:
    modules_refused = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    calls_refused = {"torch.load", "yaml.load", "eval", "exec", "os.system", "np.load"}
    wrong = []
    for module in modules():
        for item in imports(module):
            if item.target.partition(".")[0] in modules_refused:
                wrong.append(f"{module.file}:{item.line} imports {item.target}")
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe = words.get("allow_pickle") == "False" or words.get("Loader") == "_Loader"
            if (name in calls_refused and not safe) or words.get("shell") == "True":
                wrong.append(f"{module.at(node)} calls {name}")
    fail_with(wrong, "reading a file must not run what it holds (np.load needs allow_pickle=False)")


# --- sections ----------------------------------------------------------------------------------------------


def test_every_section_is_strict_and_every_field_documented() -> None:
    wrong, count = [], 0
    for package in PACKAGES:
        base = importlib.import_module(f"{package}.section").Section
        for module in modules():
            if module.package == package and any(
                item.target == f"{package}.section.Section" for item in imports(module)
            ):
                importlib.import_module(module.name)
        waiting = list(base.__subclasses__())
        while waiting:
            section = waiting.pop()
            waiting += section.__subclasses__()
            if section.__module__.partition(".")[0] not in PACKAGES:
                continue
            count += 1
            name = f"{section.__module__}.{section.__qualname__}"
            for key, value in (("frozen", True), ("extra", "forbid"), ("strict", True)):
                if section.model_config.get(key) != value:
                    wrong.append(f"{name}: {key} is {section.model_config.get(key)!r}, not {value!r}")
            wrong += [
                f"{name}.{field}: no string literal beneath it"
                for field, info in section.model_fields.items()
                if not info.description
            ]
    assert count > 3, f"found {count} sections only: this test looks in the wrong place"
    fail_with(wrong, "sections are frozen, strict, refuse unknown keys, and document each field")


# --- form --------------------------------------------------------------------------------------------------


def test_init_files_only_re_export() -> None:
    wrong = []
    for module in modules():
        if not module.is_init:
            continue
        wrong += [f"{module.at(item)} defines {item.name}" for item in [*functions(module), *classes(module)]]
        exported: list[str] = []
        given = set()
        for node in module.tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                exported = ast.literal_eval(node.value)
            if isinstance(node, ast.ImportFrom) and node.module != "__future__":
                given |= {alias.asname or alias.name for alias in node.names}
        if set(exported) != given:
            wrong.append(f"{module.file}: __all__ and the imports differ in {sorted(set(exported) ^ given)}")
    fail_with(wrong, "__init__.py re-exports public names and does nothing else")


def test_files_and_functions_are_short() -> None:
    wrong, long_files, long_functions = [], set(), set()
    for module in (*modules(), *test_modules()):
        lines = len(module.path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            long_files.add(module.file)
            if module.file not in LONG_FILES:
                wrong.append(f"{module.file} has {lines} lines")
        for item in functions(module):
            place = f"{module.file}:{item.name}"
            length = (item.end_lineno or item.lineno) - item.lineno + 1
            if length > MAX_FUNCTION_LINES:
                long_functions.add(place)
                if place not in LONG_FUNCTIONS:
                    wrong.append(f"{place} has {length} lines")
    wrong += [f"{name} stands in LONG_FILES and is short" for name in LONG_FILES.keys() - long_files]
    wrong += [f"{name} stands in LONG_FUNCTIONS and is short" for name in LONG_FUNCTIONS.keys() - long_functions]
    fail_with(wrong, f"files have at most {MAX_FILE_LINES} lines, functions {MAX_FUNCTION_LINES}")


def test_every_module_and_public_name_has_a_docstring() -> None:
    wrong = []
    for module in modules():
        if ast.get_docstring(module.tree) is None:
            wrong.append(f"{module.file} has no docstring")
        for node in module.tree.body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and ast.get_docstring(node) is None:
                wrong.append(f"{module.at(node)} {node.name} has no docstring")
    fail_with(wrong, "modules and the public functions and classes in them say what they are")


def test_every_test_file_mirrors_a_module_and_opens_with_its_subject() -> None:
    wrong = []
    for module in test_modules():
        if not module.path.name.startswith("test_"):
            continue
        if ast.get_docstring(module.tree) is None:
            wrong.append(f"{module.file} does not open by saying what is checked against what")
        parts = module.path.relative_to(ROOT / "tests").parts
        if parts[0] in PACKAGES:
            subject = ROOT.joinpath(*parts[:-1], parts[-1].removeprefix("test_"))
            if not subject.is_file():
                wrong.append(f"{module.file}: there is no {subject.relative_to(ROOT)}")
    fail_with(wrong, "tests mirror the packages")


def test_test_folders_are_packages() -> None:
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    wrong = [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()]
    fail_with(wrong, "a test folder without __init__.py")


def test_nothing_is_left_to_do_later() -> None:
    pattern = re.compile(r"#\s*(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
    wrong = []
    for module in (*modules(), *test_modules()):
        for number, line in enumerate(module.path.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line):
                wrong.append(f"{module.file}:{number} {line.strip()}")
    fail_with(wrong, "do it, or leave it unsaid")


# --- these tools can see -----------------------------------------------------------------------------------


def test_the_tools_find_what_they_look_for() -> None:
    source = "import a.b\nfrom . import c\nif TYPE_CHECKING:\n    import d\ndef f():\n    from .e import g\n"
    module = Module("solomonov.m", ROOT / "solomonov" / "m.py", ast.parse(source))
    found = [(item.target, item.inside_function, item.for_types_only) for item in imports(module)]
    assert found == [
        ("a.b", False, False),
        ("solomonov.c", False, False),
        ("d", False, True),
        ("solomonov.e.g", True, False),
    ], "imports are resolved, lazy ones and type-only ones are told apart"
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"], "a cycle is found"
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}}) == [], "a diamond is no cycle"
