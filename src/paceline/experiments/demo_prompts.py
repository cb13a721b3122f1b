"""The demo's prompts for the four tasks: written ones for math and translation, harvested ones
for code and summary, split into a collection set and a timed set that share nothing.

It does not know the text the models were trained on: that the written prompts are new, and that
third-party source is not the standard library, is what the tests check. It knows no models and no
tokens, and it never imports the packages whose source it reads.
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

# The project's dependencies and theirs. One that is missing is passed over: the harvest depends on
# the installed packages and their versions, and on nothing else.
PACKAGES = (
    "click",
    "filelock",
    "fsspec",
    "huggingface_hub",
    "jinja2",
    "networkx",
    "numpy",
    "packaging",
    "pyarrow",
    "pydantic",
    "rapidfuzz",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "typer",
    "yaml",
)

# Limits that keep a harvest near one second on a slow core: parsing is what takes the time, so
# few files of moderate size are parsed, and more of a package than this is never needed.
_FILES_PER_PACKAGE = 12
_FUNCTIONS_PER_FILE = 4
_FILE_BYTES = (1_000, 30_000)

# The middle nine tenths of the lengths, in characters, of the models' training records; but a
# signature of fewer than 30 says too little, and some are word for word in the training text.
_HEAD_CHARS = (30, 470)
_BODY_CHARS = (75, 920)
_BARE_CHARS = (52, 890)
_DOC_CHARS = (24, 300)

# Tests, generated files and copies: of the standard library, of other packages, of old versions.
_SKIPPED = re.compile(
    r"test|generated|_pb2|vendor|extern|third_party|compat|distutils|weak|_click|v1/"
)
_GENERATED = re.compile(r"(auto-?|automatically )generated|generated (by|from)|do not edit", re.I)


@dataclass(frozen=True, slots=True)
class HarvestedFunction:
    """A function of an installed package and the text its prompt shows of it."""

    package: str
    qualname: str  # dotted, from the package's folder on: "utils.generic.Cache.get"
    path: Path
    domain: str
    text: str

    def record(self) -> PromptRecord:
        identity = f"demo/{self.domain}/{self.package}.{self.qualname}"
        return PromptRecord(identity, self.domain, PREFIXES[self.domain] + self.text)


@dataclass(frozen=True, slots=True)
class Cut:
    """A function cut the way the training records are: `head` is signature, docstring and the
    comments before the first statement; `bare` is the whole function without its docstring."""

    head: str
    body: str
    bare: str
    doc: str


def load_written(domain: str) -> list[PromptRecord]:
    """The prompts written for this demo, in the file's order."""
    if domain not in WRITTEN_DOMAINS:
        raise ValueError(f"no written prompts for {domain!r}; there are for {WRITTEN_DOMAINS}")
    path = files("paceline.experiments") / "prompts" / f"{domain}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [PromptRecord(row["id"], row["domain"], row["prompt"]) for row in rows]


def harvest_functions(num: int, seed: int = 0) -> list[HarvestedFunction]:
    """`num` functions for code and `num` others for summary, read from installed packages.

    Lengths follow the training records: for code 30-470 characters of signature and docstring
    with a body of 75-920, for summary 52-890 characters of function whose docstring opens with a
    paragraph of 24-300. A function serves one domain only.
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
    """Prompts to collect on and prompts to time, so many of each task, grouped by task.

    Which set a prompt falls in depends on a hash of its id, never on the order of a file.
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
    """The parts of a function, dedented, or None where it cannot be cut between two lines."""
    doc = ast.get_docstring(node)
    rest = node.body[1:] if doc is not None else node.body
    if not rest:
        return None
    # A nested function's own line follows its decorators, which belong to the body too.
    first = min(child.lineno for child in (rest[0], *getattr(rest[0], "decorator_list", ())))
    # Decorators stay outside, as in the training records.
    whole = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
    start = first - node.lineno
    head, body, bare = whole[:start], whole[start:], whole
    if doc is not None:
        opening, closing = node.body[0].lineno, node.body[0].end_lineno or 0
        bare = whole[: opening - node.lineno] + whole[closing - node.lineno + 1 :]
    cut = Cut("\n".join(head).rstrip(), "\n".join(body), "\n".join(bare), doc or "")
    return cut if _is_well_formed(cut) else None


def _is_well_formed(cut: Cut) -> bool:
    """Printable ASCII indented by four, as the training text is, that parses after the cut."""
    whole = f"{cut.head}\n{cut.body}"
    plain = whole.isascii() and whole.replace("\n", "").isprintable()
    if not plain or not whole.startswith(("def ", "async def ")) or not cut.body.startswith("    "):
        return False
    # Dedenting can spoil a string of several lines, and the first statement can stand on the last
    # line of the signature or of the docstring.
    texts = (whole, cut.head + "\n    pass", cut.bare)
    return all(_parsed(text) is not None for text in texts)


def _parsed(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        # Warnings about other people's escape sequences are not for our user.
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _in_turns(seed: int) -> Iterator[HarvestedFunction]:
    """One function of each package in turn, so that no large package crowds out the others."""
    roots = {name: root for name in PACKAGES if (root := package_folder(name)) is not None}
    names = sorted(roots, key=lambda name: _hash(f"{name}:{seed}"))
    streams = [_package_functions(name, roots[name], seed) for name in names]
    while streams:
        # Packages that have run dry leave the round.
        drawn = [(stream, next(stream, None)) for stream in streams]
        streams = [stream for stream, function in drawn if function is not None]
        yield from (function for _, function in drawn if function is not None)


def package_folder(name: str) -> Path | None:
    """Where an installed package lies; None if it is not installed."""
    # The standard library is what the models were trained on.
    if name in sys.stdlib_module_names:
        return None
    spec = find_spec(name)
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(locations[0]) if locations else None


def _package_functions(package: str, root: Path, seed: int) -> Iterator[HarvestedFunction]:
    # Two levels are enough to choose from; walking all of torch would cost more than parsing.
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
    """A file's text, or None for a generated, undecodable, tiny or very long file."""
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
    # Not splitlines(): it also breaks at form feeds, which ast does not count as line ends.
    lines = source.split("\n")
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    nodes = [(f"{module}.{inner}", node) for inner, node in _definitions(tree, "")]
    counts = Counter(qualname for qualname, _ in nodes)
    # Overloads, properties with setters and alternatives by platform share one name; an id
    # must name one function.
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
    """Functions and methods with their names; those inside functions need their surroundings."""
    for node in parent.body:
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{scope}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name[-2:] != "__":
            # Special methods are left out: their signatures say nothing of the class, and many are
            # word for word those of the training text.
            yield f"{scope}{node.name}", node


def _domain_and_text(cut: Cut, key: str) -> tuple[str, str] | None:
    """What a function of this form can be used for; only a documented one can be summarized."""
    # Half of the documented functions go to code: there too, part of the prompts must say in
    # words what to write, as in the training records.
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
        raise ValueError(f"{asked} {domain} prompts asked for, but only {existing} exist")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
