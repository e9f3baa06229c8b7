"""Finds the Python program in a chat answer: fenced, bare, with prose around it, or a function's body."""

import ast
import builtins
import html
import re
import symtable
import warnings
from collections.abc import Iterator

LONGEST = 10_000  # characters of an answer that are read
TRIES = 40  # lines where a program or a body may begin and none does, and cuts of a program's end
LANGUAGE = r"\{?\.?(?:python|py)[\d.]*\}?\b"
TAG = re.compile(
    r"</?(?:pre|code|python|answer|solution)\b[^>\n]*>|\[/?(?:PYTHON|CODE|ANSWER)\]", re.IGNORECASE
)
INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u200c\u200d\u2060")) | dict.fromkeys((0xA0, 0x202F), " ")
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # what Python's parser raises

PROGRAM = re.compile(
    r"\s*(?:from\s+[\w.]+\s+import\b|import\s+\w|(?:async\s+)?def\s+\w|class\s+\w|@\w|\w+\s*=)"
)
BODY = re.compile(
    r"[ \t]+\S|(?:return|if|for|while|with|try|def|import|from|raise|yield)\b|[\w, ]+[-+*/]?=[^=]"
)

# Rewritings of an answer, tried one after another.
FORMS = (
    (re.compile(r"^[ \t]*(?=`{3}|~{3})", re.MULTILINE), ""),  # an indented fence ends its block, too
    (
        re.compile(rf"(?:`+|~{{3,}})[ \t]*(?:{LANGUAGE})?", re.IGNORECASE),
        "\n```\n",
    ),  # code in a line of prose
    (
        re.compile(r"^(?:>>> ?|\.\.\. ?|In \[\d+\]: |   \.\.\.: |> ?|\+)", re.MULTILINE),
        "",
    ),  # prompts, quotations
    (re.compile(r"^ *\d+(?:[.:|)] ?| )", re.MULTILINE), ""),  # numbered lines
)


def complete(prompt: str, entry_point: str, answer: str) -> str:
    """A program that defines the function, after what comes before it in the prompt; if there is none in the
    answer, the answer as it is, which will fail."""
    before = prompt.partition(f"def {entry_point}(")[0]
    try:
        return next(programs(prompt, before, entry_point, answer), before + answer)
    except RecursionError:  # of ast.unparse, at expressions that are nested by hundreds
        return before + answer


def programs(prompt: str, before: str, entry_point: str, answer: str) -> Iterator[str]:
    """The first part of an answer that defines the function counts, with what other parts define for it; then
    a method of this name; then what continues the prompt as the function's body."""
    text = clean(answer)
    texts = list(dict.fromkeys(pattern.sub(instead, text) for pattern, instead in FORMS))
    read = []
    for text in texts:
        read.append(parts := list(runs(text)))
        for part in parts:
            if implements(part, entry_point):
                yield joined(before, part, parts)
    for parts in read:
        for part in parts:
            for node in part:
                if isinstance(node, ast.ClassDef) and implements(node.body, entry_point):
                    method = ast.parse(f"{entry_point} = {node.name}().{entry_point}").body
                    yield joined(before, [*part, *method], parts)
    for text in texts:
        for lines in bodies(text):
            part = top(prompt.rstrip().split("\n") + lines)
            if implements(part, entry_point):
                yield joined("", part, [])


def clean(answer: str) -> str:
    """The text with one kind of line end and blank, and without tags around code."""
    text = answer[:LONGEST].replace("\r\n", "\n").replace("\r", "\n").translate(INVISIBLE)
    text = re.sub(r"^[ \t]+", lambda found: found[0].expandtabs(4), text, flags=re.MULTILINE)
    text = re.sub(r"(?<=\S)[ \t]*(?:`{3,}|~{3,})[ \t]*$", "\n```", TAG.sub("\n", text), flags=re.MULTILINE)
    return html.unescape(text) if re.search("&(?:[lg]t|quot|amp|#39);", text) else text


def runs(text: str) -> Iterator[list[ast.stmt]]:
    """The statements that parse, from each line on that may begin a program and is not part of one."""
    lines = text.split("\n")
    at = failed = 0
    while at < len(lines) and failed < TRIES:
        body: list[ast.stmt] = []
        if PROGRAM.match(lines[at]):
            body = top(lines[at:])
            failed += not body
        if body:
            yield body
        at += max((node.end_lineno or 0 for node in body), default=1)


def top(lines: list[str]) -> list[ast.stmt]:
    """The statements that lines begin with, up to the one that is none: what is wrong inside a function makes
    all of it wrong. The first line's indentation is taken from all of them."""
    lines = outdented(lines)
    for _ in range(TRIES):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse("\n".join(lines)).body
        except SyntaxError as error:
            wrong = min(len(lines), error.lineno or 1) - 1
            while wrong > 0 and (not lines[wrong] or lines[wrong][0] in " )]}#"):
                wrong -= 1
            lines = lines[:wrong]
        except UNREADABLE:
            break
    return []


def outdented(lines: list[str]) -> list[str]:
    """Lines without the indentation of the first."""
    margin = len(lines[0]) - len(lines[0].lstrip())
    return [line[margin:] if line[:margin].isspace() else line.lstrip() if margin else line for line in lines]


def bodies(text: str) -> Iterator[list[str]]:
    """Lines that may be a function's body, indented as one, and belong to no other function."""
    lines = text.split("\n")
    inside, starts = None, []
    for at, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if inside is not None and line.strip() and indent <= inside:
            inside = None
        if inside is None and BODY.match(line):
            starts.append(at)
        if inside is None and re.match(r"\s*(?:async |def |class )", line):
            inside = indent
    for at in starts[: TRIES // 4]:
        yield lines[at:]
        rest = outdented(lines[at:])
        yield ["    " + rest[0], *rest[1:]]
        yield ["    " + line for line in rest]


def implements(body: list[ast.stmt], name: str) -> bool:
    """Whether statements define a function that gives something back."""
    for node in body:
        match node:
            case ast.FunctionDef(name=found) if found == name and not stub(node):
                return True
            case ast.Assign(targets=[ast.Name(id=found)], value=ast.Lambda() | ast.Name()) if found == name:
                return True
            case ast.If() | ast.Try():
                if name in bound([node]):
                    return True
    return False


def stub(function: ast.FunctionDef) -> bool:
    """Whether a function gives nothing back: a signature with a docstring, or an example taken for a body."""
    return not any(isinstance(node, ast.Return | ast.Yield | ast.YieldFrom) for node in ast.walk(function))


def bound(body: list[ast.stmt]) -> set[str]:
    """The names that statements give a value to."""
    try:
        table = symtable.symtable(ast.unparse(ast.Module(body, [])), "answer", "exec")
    except UNREADABLE:
        return set()
    return {found.get_name() for found in table.get_symbols() if found.is_assigned() or found.is_imported()}


def used(body: list[ast.stmt]) -> set[str]:
    return {node.id for part in body for node in ast.walk(part) if isinstance(node, ast.Name)}


def joined(before: str, part: list[ast.stmt], parts: list[list[ast.stmt]]) -> str:
    """The program: the definitions of a part, after those of the prompt and of other parts that it uses."""
    body = [node for node in part if defines(node)]
    head = top(before.split("\n"))
    others = [node for other in parts if other is not part for node in other if defines(node)]
    while missing := used(body) - bound(head + body) - set(dir(builtins)):
        found = next((node for node in others if bound([node]) & missing), None)
        if found is None:
            break
        body.insert(0, found)
    future = [node for node in body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    body = [*future, *head, *(node for node in body if node not in future)]
    return ast.unparse(ast.Module(body, []))


def defines(node: ast.stmt) -> bool:
    """Whether a statement of an answer is part of its program, and not an example, a test or a word."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute)
    if isinstance(node, ast.If):
        return "__name__" not in used([node])
    if isinstance(node, ast.AnnAssign):
        return node.value is not None
    return not isinstance(node, ast.Assert | ast.Return)
