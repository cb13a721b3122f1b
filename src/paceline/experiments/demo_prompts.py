"""The demo's prompts for the four tasks: written ones for math and translation, and for code and
summary functions of installed packages, split into disjoint sets to collect and to time.

The tests check that the written prompts are not in the models' training text and that no function is
of the standard library, which is. Knows no models and no tokens, and never imports the packages whose
source it reads.
"""

import ast
import hashlib
import json
import re
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from paceline.contracts import PromptRecord

WRITTEN_DOMAINS = ("math", "translation")
HARVESTED_DOMAINS = ("code", "summary")
PREFIXES = {
    "math": "Solve the problem step by step:\n",
    "translation": "Translate English to French:\n",
    "code": "Complete the Python function:\n",
    "summary": "Summarize the Python function:\n",
}

# The project's dependencies and theirs. A missing one is skipped: the harvest depends on the installed
# packages and their versions alone.
PACKAGES = (
    "click", "filelock", "fsspec", "huggingface_hub", "jinja2", "networkx", "numpy", "packaging",
    "pyarrow", "pydantic", "rapidfuzz", "rich", "safetensors", "tokenizers", "torch", "tqdm",
    "transformers", "typer", "yaml",
)  # fmt: skip

# Limits that keep a harvest near one second on a slow core. Parsing takes the time, so only a few files
# of moderate size are parsed per package.
_FILES_PER_PACKAGE = 12
_FUNCTIONS_PER_FILE = 4
_FILE_BYTES = (1_000, 30_000)

# The middle nine tenths of the lengths, in characters, of the models' training records; but shorter
# signatures than 30 say too little, and some of them are in the training text.
_HEAD_CHARS = (30, 470)
_BODY_CHARS = (75, 920)
_BARE_CHARS = (52, 890)
_DOC_CHARS = (24, 300)

# Tests, generated files, and copies of the standard library, of other packages or of old versions.
_SKIPPED = re.compile(
    r"test|generated|_pb2|vendor|extern|third_party|compat|distutils|weak|_click|v1/"
)
_GENERATED = re.compile(r"(auto-?|automatically )generated|generated (by|from)|do not edit", re.I)


@dataclass(frozen=True, slots=True)
class HarvestedFunction:
    """A function of an installed package, and the part of it that its prompt shows."""

    package: str
    qualname: str  # dotted, from the package's folder: "utils.generic.Cache.get"
    path: Path
    domain: str
    text: str

    def record(self) -> PromptRecord:
        """Return the function's prompt."""
        identity = f"demo/{self.domain}/{self.package}.{self.qualname}"
        return PromptRecord(identity, self.domain, PREFIXES[self.domain] + self.text)


@dataclass(frozen=True, slots=True)
class Cut:
    """A function in parts, as in the training records: `head` is the signature, the docstring and the
    comments before the first statement; `bare` is the function without its docstring.
    """

    head: str
    body: str
    bare: str
    doc: str


def load_written(domain: str) -> list[PromptRecord]:
    """Return a domain's written prompts, in the file's order. Raises ValueError if it has none."""
    if domain not in WRITTEN_DOMAINS:
        raise ValueError(f"no written prompts for {domain!r}; domains with them: {WRITTEN_DOMAINS}")
    path = files("paceline.experiments") / "prompts" / f"{domain}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [PromptRecord(row["id"], row["domain"], row["prompt"]) for row in rows]


def harvest_functions(num: int, seed: int = 0) -> list[HarvestedFunction]:
    """Return `num` functions for code and `num` others for summary, read from installed packages.

    Lengths follow the training records: for code 30-470 characters of signature and docstring and
    75-920 of body, for summary 52-890 characters of function and 24-300 of the docstring's first
    paragraph. Raises ValueError if there are not enough functions.
    """
    found: dict[str, list[HarvestedFunction]] = {domain: [] for domain in HARVESTED_DOMAINS}
    texts: set[str] = set()
    for function in _in_turns(seed):
        wanted = found[function.domain]
        if len(wanted) < num and function.text not in texts:
            texts.add(function.text)
            wanted.append(function)
        if all(len(functions) >= num for functions in found.values()):
            break
    for domain, functions in found.items():
        _require(domain, num, len(functions))
    return [function for functions in found.values() for function in functions]


def demo_prompts(
    per_task_collect: int, per_task_timed: int, seed: int = 0
) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Return prompts to collect and prompts to time, both grouped by task.

    The set of a prompt depends on a hash of its id, never on the order of a file. Raises ValueError if
    there are not enough prompts.
    """
    if per_task_collect < 0 or per_task_timed < 0:
        raise ValueError(f"negative number of prompts: {per_task_collect}, {per_task_timed}")
    num = per_task_collect + per_task_timed
    pools = {domain: load_written(domain) for domain in WRITTEN_DOMAINS}
    for domain, pool in pools.items():
        _require(domain, num, len(pool))
    harvested = [function.record() for function in harvest_functions(num, seed)]
    for domain in HARVESTED_DOMAINS:
        pools[domain] = [record for record in harvested if record.domain == domain]
    collect: list[PromptRecord] = []
    timed: list[PromptRecord] = []
    for pool in pools.values():
        ranked = sorted(pool, key=lambda record: _hash(f"{record.id}:{seed}"))
        collect += ranked[:per_task_collect]
        timed += ranked[per_task_collect:num]
    return collect, timed


def cut_function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Cut | None:
    """Return the parts of a function, dedented, or None if they do not begin on lines of their own."""
    doc = ast.get_docstring(node)
    rest = node.body[1:] if doc is not None else node.body
    if not rest:
        return None
    # The decorators of a nested function are before its line and belong to the body.
    first = min(child.lineno for child in (rest[0], *getattr(rest[0], "decorator_list", ())))
    # The function's own decorators are left out, as in the training records.
    whole = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
    start = first - node.lineno
    head, body, bare = whole[:start], whole[start:], whole
    if doc is not None:
        opening, closing = node.body[0].lineno, node.body[0].end_lineno or 0
        bare = whole[: opening - node.lineno] + whole[closing - node.lineno + 1 :]
    cut = Cut("\n".join(head).rstrip(), "\n".join(body), "\n".join(bare), doc or "")
    return cut if _is_well_formed(cut) else None


def _is_well_formed(cut: Cut) -> bool:
    """Return True for printable ASCII indented by four, as in training, whose parts can be parsed."""
    whole = f"{cut.head}\n{cut.body}"
    plain = whole.isascii() and whole.replace("\n", "").isprintable()
    if not plain or not whole.startswith(("def ", "async def ")) or not cut.body.startswith("    "):
        return False
    # Dedenting can break a string of several lines, and the first statement can be on the last line of
    # the signature or of the docstring.
    texts = (whole, cut.head + "\n    pass", cut.bare)
    return all(_parsed(text) is not None for text in texts)


def _parsed(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        # The user cannot correct escape sequences in other packages.
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _in_turns(seed: int) -> Iterator[HarvestedFunction]:
    """Yield a function of each package in turn, so that a large package does not displace others."""
    roots = {name: root for name in PACKAGES if (root := package_folder(name)) is not None}
    names = sorted(roots, key=lambda name: _hash(f"{name}:{seed}"))
    streams = [_package_functions(name, roots[name], seed) for name in names]
    while streams:
        # Packages without further functions are dropped.
        drawn = [(stream, next(stream, None)) for stream in streams]
        streams = [stream for stream, function in drawn if function is not None]
        yield from (function for _, function in drawn if function is not None)


def package_folder(name: str) -> Path | None:
    """Return the folder of an installed package; None if it is not installed."""
    # The models were trained on the standard library.
    if name in sys.stdlib_module_names:
        return None
    spec = find_spec(name)
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(locations[0]) if locations else None


def _package_functions(package: str, root: Path, seed: int) -> Iterator[HarvestedFunction]:
    # Two levels are enough; a walk through all of torch would take longer than parsing.
    paths = [*root.glob("*.py"), *root.glob("*/*.py")]
    named = {path.relative_to(root).as_posix(): path for path in paths}
    usable = [name for name in named if not _SKIPPED.search(name)]
    usable.sort(key=lambda name: (_hash(f"{package}:{name}:{seed}"), name))
    parsed = 0
    for name in usable:
        source = _readable_source(named[name])
        if source is None:
            continue
        yield from _file_functions(package, name, named[name], source, seed)
        parsed += 1
        if parsed == _FILES_PER_PACKAGE:
            return


def _readable_source(path: Path) -> str | None:
    """Return a file's text, or None for a generated, undecodable, tiny or very long file."""
    if not _FILE_BYTES[0] <= path.stat().st_size <= _FILE_BYTES[1]:
        return None
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if _GENERATED.search(source, 0, 1_000) else source


def _file_functions(
    package: str, name: str, path: Path, source: str, seed: int
) -> Iterator[HarvestedFunction]:
    tree = _parsed(source)
    if tree is None:
        return
    # Not splitlines(): it also splits at form feeds, which ast does not count as line ends.
    lines = source.split("\n")
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    nodes = [(f"{module}.{inner}", node) for inner, node in _definitions(tree, "")]
    counts = Counter(qualname for qualname, _ in nodes)
    # Overloads, properties with setters and variants by platform share a name; an id must name one
    # function.
    nodes = [(qualname, node) for qualname, node in nodes if counts[qualname] == 1]
    nodes.sort(key=lambda item: _hash(f"{package}:{item[0]}:{seed}"))
    taken = 0
    for qualname, node in nodes:
        cut = cut_function(node, lines)
        choice = _domain_and_text(cut, f"{package}:{qualname}:{seed}") if cut is not None else None
        if choice is not None:
            yield HarvestedFunction(package, qualname, path, *choice)
            taken += 1
        if taken == _FUNCTIONS_PER_FILE:
            return


def _definitions(
    parent: ast.Module | ast.ClassDef, scope: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield functions and methods with their names, but not those inside functions."""
    for node in parent.body:
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{scope}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name[-2:] != "__":
            # Special methods are left out: their signatures do not describe the class, and many are
            # in the training text.
            yield f"{scope}{node.name}", node


def _domain_and_text(cut: Cut, key: str) -> tuple[str, str] | None:
    """Return the domain and text of a function, or None; a summary needs a docstring."""
    # Half of the documented functions are for code, where a part of the prompts must describe the
    # function in words, as in the training records.
    for_summary = bool(cut.doc) and int(_hash(f"domain:{key}"), 16) % 2 == 0
    if for_summary:
        opening = cut.doc.split("\n\n")[0]
        fits = _within(opening, _DOC_CHARS) and _within(cut.bare, _BARE_CHARS)
        return ("summary", cut.bare) if fits else None
    fits = _within(cut.head, _HEAD_CHARS) and _within(cut.body, _BODY_CHARS)
    return ("code", cut.head) if fits else None


def _within(text: str, limits: tuple[int, int]) -> bool:
    return limits[0] <= len(text) <= limits[1]


def _require(domain: str, asked: int, existing: int) -> None:
    if asked > existing:
        raise ValueError(f"{asked} {domain} prompts are needed, but only {existing} exist")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
