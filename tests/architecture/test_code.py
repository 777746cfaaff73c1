"""Rules of the code that a reader could forget: exactness and purity of the core, names, prose."""

import ast
import re
import sys

import pytest

from tests.architecture.sources import REPOSITORY, SERVICES, Source, dotted, files, imported, pure, sources, within

# Decimal divided by a power of ten, in a context with room for all its digits.
DIVISIONS_ALLOWED = {("contracts/pricing/rating.py", "rate"), ("contracts/pricing/arithmetic.py", "divided")}

VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager", "managers", "misc"}

# The same names in every service, in the order data flows; a new kind of file is a new layer, decided once.
LAYERS = (
    "app",
    "settings",
    "routes",
    "subscribers",
    "handlers",
    "engine",
    "replay",
    "queries",
    "audit",
    "portability",
    "sweeper",
    "correcting",
    "translate",
    "store",
    "audit_sql",
    "audit_partition",
    "replay_sql",
    "signing",
    "projections",
    "tables",
)

# A parameter may be called `now`: what it must not be is asked of a clock.
IMPURE = re.compile(
    r".*\.(now|utcnow|today|fromtimestamp|time_ns|monotonic|perf_counter)"
    r"|(.*\.)?(getenv|environ(\..*)?|uuid1|uuid4|getnode|urandom)"
    r"|time\.time|random\..*|secrets\..*|open|input|print"
)
IMPURE_MODULES = {
    "logging",
    "structlog",
    "random",
    "secrets",
    "time",
    "os",
    "io",
    "socket",
    "asyncio",
    "anyio",
    "warnings",
}

# Glossary: say account, unit, hold, charge.
OTHER_WORDS = re.compile(r"customer|tenant|reservation|escrow|deduction|currency", re.IGNORECASE)


def found_in(name: str, code: str) -> Source:
    """A file that does not exist, to try a rule on."""
    return Source(path=sources()[0].path.parent / name, text=code, tree=ast.parse(code))


def floats(source: Source) -> list[str]:
    functions = {
        child: function.name
        for function in ast.walk(source.tree)
        if isinstance(function, ast.FunctionDef)
        for child in ast.walk(function)
    }
    problems = []
    for node in ast.walk(source.tree):
        match node:
            case ast.Constant(value=float() | complex() as value):
                problems.append(f"{source.where(node)} writes {value}")
            case ast.Name(id="float" | "complex" | "round"):
                problems.append(f"{source.where(node)} says {node.id}")
            case ast.BinOp(op=ast.Div()) | ast.AugAssign(op=ast.Div()):
                if (source.name, functions.get(node)) not in DIVISIONS_ALLOWED:
                    problems.append(f"{source.where(node)} divides with /")
            case _:
                pass
    problems += [
        f"{source.where(node)} imports {name}"
        for node, name in imported(source)
        if name.split(".")[0] in ("math", "cmath", "statistics", "numpy")
    ]
    return problems


def impurities(source: Source) -> list[str]:
    problems = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
            problems.append(f"{source.where(node)} is async")
        if isinstance(node, ast.Attribute | ast.Name) and IMPURE.fullmatch(dotted(node)):
            problems.append(f"{source.where(node)} reaches for {dotted(node)}")
        if isinstance(node, ast.Global | ast.Nonlocal):
            problems.append(f"{source.where(node)} changes what is outside a function")
    problems += [
        f"{source.where(node)} imports {name}"
        for node, name in imported(source)
        if name.split(".")[0] in IMPURE_MODULES or IMPURE.fullmatch(name)
    ]
    return problems


def test_there_is_something_to_check() -> None:
    assert len(list(within("contracts"))) > 10
    assert SERVICES
    assert {source.path.parts[1] for source in pure() if source.path.parts[0] == "services"} == set(SERVICES)


def test_contracts_and_domains_know_no_float() -> None:
    assert [problem for source in pure() for problem in floats(source)] == []


@pytest.mark.parametrize(
    "code", ["x = 0.5", "x: float", "def f(a: int) -> 'int':\n    return a / 2", "x /= 2", "import math"]
)
def test_a_float_would_be_noticed(code: str) -> None:
    assert floats(found_in("x.py", code))


def test_tables_have_no_float_columns() -> None:
    for source in within("services"):
        if source.path.name != "tables.py" and "migrations" not in source.path.parts:
            continue
        names = {dotted(node).rsplit(".", 1)[-1].lower() for node in ast.walk(source.tree)}
        assert not names & {"float", "double", "double_precision", "real"}, source.name
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                types = re.search(
                    r"\s(double precision|real|float[48]?)\b\s*(,|\)|not|null|default|$)", node.value, re.I
                )
                assert types is None, f"{source.where(node)}: {types}"


def test_contracts_and_domains_only_compute() -> None:
    assert [problem for source in pure() for problem in impurities(source)] == []


@pytest.mark.parametrize(
    "code",
    [
        "from datetime import datetime\nx = datetime.now()",
        "import datetime\nx = datetime.datetime.utcnow()",
        "from datetime import date\nx = date.today()",
        "import time",
        "from time import time",
        "import uuid\nx = uuid.uuid4()",
        "from uuid import uuid4",
        "import random",
        "import os\nx = os.environ['X']",
        "from os import environ",
        "import logging",
        "async def f() -> None: ...",
        "print(1)",
        "x = open('f')",
        "clock = datetime.now",
    ],
)
def test_an_impurity_would_be_noticed(code: str) -> None:
    assert impurities(found_in("x.py", code))


def test_nothing_is_printed() -> None:
    for source in within("contracts", "services"):
        calls = [node for node in ast.walk(source.tree) if isinstance(node, ast.Call) and dotted(node.func) == "print"]
        assert not calls, source.where(calls[0])


def test_every_module_says_what_it_is_in_one_to_five_lines() -> None:
    problems = []
    for source in within("contracts", "services", "infra", "bench", "tests"):
        if source.path.parts[0] == "tests" and not source.text:
            continue
        lines = [line for line in (ast.get_docstring(source.tree) or "").splitlines() if line.strip()]
        # The errors module draws its tree.
        lines_max = 5 if source.path.parts[0] in ("contracts", "services") and source.path.name != "errors.py" else 20
        if not 1 <= len(lines) <= lines_max:
            problems.append(f"{source.name}: its docstring has {len(lines)} lines")
    assert problems == []


def test_no_file_has_a_vague_name() -> None:
    for path in files():
        assert not {part.split(".")[0] for part in path.parts} & VAGUE_NAMES, path


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_only_the_files_that_every_service_has(service: str) -> None:
    inside = [path.relative_to(f"services/{service}") for path in files() if path.parts[:2] == ("services", service)]
    names = {path.parts[0] for path in inside}
    assert names <= {"__init__.py", "README.md", "domain", "migrations"}.union(*map(files_of, LAYERS))
    assert [layer for layer in LAYERS if names >= files_of(layer)] == [], "a layer is a file or a package, not both"
    packages = [path for path in inside if path.parts[0] in {"domain", *LAYERS}]
    # A package may say more than the service's README has room for.
    assert all(len(path.parts) == 2 and (path.suffix == ".py" or path.name == "README.md") for path in packages)


def files_of(layer: str) -> set[str]:
    """A layer is a module, or a package of the same name once it is more than one reads at a time."""
    return {layer, f"{layer}.py"}


@pytest.mark.parametrize("service", SERVICES)
def test_a_services_readme_says_what_it_owns_and_promises(service: str) -> None:
    readme = REPOSITORY / "services" / service / "README.md"
    assert readme.exists(), f"services/{service} has no README.md"
    text = readme.read_text(encoding="utf-8").lower()
    for heading in ("owns", "does not own", "consumes", "publishes", "invariants"):
        assert heading in text, f"services/{service}/README.md does not say what it {heading}"
    assert re.search(r"^1\. ", text, re.MULTILINE), f"services/{service}/README.md numbers no invariants"


def test_every_match_of_the_core_ends_in_assert_never() -> None:
    problems = []
    for source in pure():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Match):
                calls = [dotted(call.func) for call in ast.walk(node.cases[-1]) if isinstance(call, ast.Call)]
                if "assert_never" not in calls:
                    problems.append(source.where(node))
    assert problems == []


def test_the_core_says_the_glossarys_words() -> None:
    for source in pure():
        for node in ast.walk(source.tree):
            match node:
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                    assert not OTHER_WORDS.search(name), f"{source.where(node)}: {name}"
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                    assert not OTHER_WORDS.search(name), f"{source.where(node)}: {name}"
                case _:
                    pass


def test_what_is_silenced_says_which_rule_and_why() -> None:
    silenced = re.compile(
        r"#\s*(noqa|type:\s*ignore|pragma)(?P<rule>: [A-Z0-9, ]*[0-9]|\[[a-z, -]+\])?(?P<why>\s+[-#] \S)?"
    )
    problems = []
    for source in sources():
        if source.path.parts[:2] == ("tests", "architecture"):
            continue
        lines = source.text.splitlines()
        for number, line in enumerate(lines):
            found = silenced.search(line)
            if found and not (found["rule"] and (found["why"] or lines[number - 1].lstrip().startswith("# "))):
                problems.append(f"{source.name}:{number + 1}: {line.strip()}")
    assert problems == [], "say which rule and why, `# noqa: RULE - why`, or in a comment above"


def test_what_is_installed_does_not_need_the_tests() -> None:
    for source in within("contracts", "services", "infra"):
        for node, name in imported(source):
            assert name.split(".")[0] not in ("tests", "bench", "hypothesis", "pytest"), source.where(node)


def test_the_independent_computation_imports_nothing_of_ours() -> None:
    (independent,) = (source for source in sources() if source.name == "infra/demo/independent.py")
    for node, name in imported(independent):
        assert name.split(".")[0] in sys.stdlib_module_names, independent.where(node)
