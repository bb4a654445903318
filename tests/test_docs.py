"""README.md and doc/: links resolve, quoted messages are those of the code, README stays short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "doc").glob("*.md")), ROOT / "tests/README.md"]


FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


def names_in(path):
    """The names that a source file defines: functions, classes, methods, fields and attributes."""
    text = path.read_text()
    if path.suffix == ".c":
        return set(re.findall(r"\b(\w+)\(", text))
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
            if isinstance(node, ast.ClassDef):
                body = [x for x in node.body if isinstance(x, FUNCTIONS)]
                names |= {f"{node.name}.{x.name}" for x in body}
                fields = [x for x in node.body if isinstance(x, ast.AnnAssign)]
                names |= {f"{node.name}.{x.target.id}" for x in fields}
        elif isinstance(node, ast.Assign):
            names |= {x.id for x in node.targets if isinstance(x, ast.Name)}
    return names


def test_names_in_the_map_of_the_code_exist():
    text = (ROOT / "doc/code.md").read_text()
    named = re.findall(r"`(\w+\.(?:py|c)):([\w.]+)`", text)
    assert len(named) > 30
    missing = [f"{file}:{name}" for file, name in named if name not in names_in(ROOT / file)]
    assert not missing


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2000


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_relative_links_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    missing = [
        link
        for link in links
        if "://" not in link and not (page.parent / link.partition("#")[0]).exists()
    ]
    assert not missing
    assert links or page != PAGES[0]  # the expression finds links


def test_files_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| file |") : text.index("| document |")]
    names = re.findall(r"`([\w/]+\.\w+|\w+/)`", table)
    assert len(names) >= 20 and not [name for name in names if not (ROOT / name).exists()]
    sources = {path.name for path in ROOT.glob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}


def message_patterns():
    """(regular expression, its number of literal characters) of each string in the sources. What an
    f-string or printf inserts is any text."""
    for path in ROOT.glob("*.py"):
        tree = ast.parse(path.read_text())
        parts = {id(x) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for x in n.values}
        for node in ast.walk(tree):
            values = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [getattr(x, "value", None) for x in values]
            if id(node) not in parts and any(isinstance(text, str) for text in texts):
                texts = [text if isinstance(text, str) else None for text in texts]
                texts[0] = re.sub("^error: ", "", texts[0]) if texts[0] else None
                pattern = "".join(".+?" if text is None else re.escape(text) for text in texts)
                yield re.compile(pattern), sum(len(text or "") for text in texts)
    source = re.sub(r'"\s*\n\s*"', "", (ROOT / "run.c").read_text())
    for text in re.findall(r'"((?:[^"\\\n]|\\.)+)"', source):
        literals = re.split(r"%[-+.*\d]*(?:ll|z)?[a-zA-Z]", text)
        yield re.compile(".+?".join(map(re.escape, literals))), sum(map(len, literals))


PATTERNS = [
    (pattern, re.compile(pattern.pattern + "$"), size)
    for pattern, size in message_patterns()
    if size >= 12 and pattern.pattern.count(r"\ ") >= 2  # more than a name
]


def is_of_the_code(message):
    """Whether a string of the sources is a large part of a message, or the end of it."""
    message = re.sub(r" \(see \S+ --help\)$", "", message)  # added by parse_args
    return any(
        (size >= 20 and pattern.search(message)) or end.search(message)
        for pattern, end, size in PATTERNS
    )


MESSAGES = re.findall(
    r"^(?:error|note): (.+)$", (ROOT / "doc/troubleshooting.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize("message", MESSAGES)
def test_quoted_messages_are_those_of_the_code(message):
    """If this fails after a message was changed: quote the new one in doc/troubleshooting.md."""
    assert is_of_the_code(message)


def test_other_messages_are_not():
    assert len(MESSAGES) >= 25
    assert not is_of_the_code("a prompt has 342 tokens; the context of the model holds 1 to 63")
    changed = [re.sub(r"\b([a-z]{4,})\b", r"\1x", message) for message in MESSAGES]
    assert not any(map(is_of_the_code, changed))
