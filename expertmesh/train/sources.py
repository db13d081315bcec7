"""Where the text comes from: one freely licensed corpus for each domain, as clean documents.

Owns fetching (Debian packages, the running interpreter's library) and turning each format into plain text. Does not
know how the text is split, tokenized or learned. Invariant: the documents of a domain depend only on the versions of
its sources.
"""

from __future__ import annotations

import gzip
import hashlib
import platform
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from expertmesh.errors import ConfigError

CACHE = Path.home() / ".cache/expertmesh/train"
"""Where downloads are kept unless the person says otherwise."""

PAGE_CHARS = 2000
"""Dictionary entries are short, so a document of that domain is a page of neighbouring entries of about this length."""

# Tables and test fixtures read like data, not like programs.
NOT_PROSE = {"__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}

MACHINE_OWN = ("_sysconfigdata", "config-")
"""What these name was written when this interpreter was built, and holds the paths of that machine."""

VERSE = re.compile(r"^(?P<chapter>[1-3]?[A-Za-z]+\d+):\d+ (?P<text>.+)$")
ENTRY = re.compile(r"^(?=\S)", re.MULTILINE)
SENSE = re.compile(r"^    (?=(?:[a-z]+ )?\d+: )", re.MULTILINE)
NUMBER = re.compile(r"^(?:[a-z]+ )?\d+: ")
ABOUT = "00-database"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One unit of text that is never divided between training and held-out data."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """All text of one domain, and where it came from."""

    domain: str
    documents: tuple[Document, ...]
    source: str
    licence: str

    @property
    def sha256(self) -> str:
        """Names the exact text, so that two runs can tell whether they read the same."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.text.encode())
        return digest.hexdigest()


def fetch(cache: Path) -> tuple[Corpus, ...]:
    """Get every domain's corpus, keeping what was downloaded in `cache`.

    Raises ConfigError where a Debian package cannot be had.
    """
    return (scripture(cache), dictionary(cache), python())


def scripture(cache: Path) -> Corpus:
    """The King James Bible; a document is a chapter, one verse on a line."""
    program = debian_package("bible-kjv", cache) / "usr/bin/bible"
    text = debian_package("bible-kjv-text", cache) / "usr/lib"
    command = [str(program), "-f", "-p", str(text), "gen1:1-rev22:21"]
    try:
        dump = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"domain scripture: {program} does not run ({error}); install libreadline8") from error
    verses = [match for match in map(VERSE.match, dump.splitlines()) if match]
    chapters = groupby(verses, key=lambda verse: verse["chapter"])
    return Corpus(
        domain="scripture",
        documents=tuple(
            Document(name=chapter, text="".join(f"{verse['text']}\n" for verse in group)) for chapter, group in chapters
        ),
        source=f"King James Version, 1611, from Debian bible-kjv-text {package_version('bible-kjv-text', cache)}",
        licence="public domain",
    )


def dictionary(cache: Path) -> Corpus:
    """WordNet as a dictionary; a document is a page of entries."""
    path = debian_package("dict-wn", cache) / "usr/share/dictd/wn.dict.dz"
    entries = dictionary_entries(gzip.decompress(path.read_bytes()).decode())
    return Corpus(
        domain="dictionary",
        documents=tuple(pages(entries)),
        source=f"WordNet 3.0 from Debian dict-wn {package_version('dict-wn', cache)}",
        licence="WordNet License",
    )


def dictionary_entries(dump: str) -> list[str]:
    """Turn a dict(5) dump of WordNet into entries: the headword, then each sense on one indented line.

    Synonyms repeat each other's senses word for word. A sense is kept where it is first met, else the held-out pages
    would mostly be in the training pages too. An entry without a sense of its own is dropped.
    """
    seen: set[str] = set()
    entries: list[str] = []
    for block in ENTRY.split(dump):
        headword, *senses = SENSE.split(block)
        lines = [" ".join(sense.split()) for sense in senses]
        glosses = [NUMBER.sub("", line).split(" [syn:")[0] for line in lines]
        fresh = [line for line, gloss in zip(lines, glosses, strict=True) if gloss not in seen]
        seen.update(glosses)
        if fresh and not headword.startswith(ABOUT):
            entries.append(headword.strip() + "\n" + "".join(f"    {line}\n" for line in fresh))
    return entries


def pages(entries: list[str]) -> list[Document]:
    """Join neighbouring entries to documents of about PAGE_CHARS characters."""
    documents: list[Document] = []
    page: list[str] = []
    length = 0
    for entry in entries:
        page.append(entry)
        length += len(entry)
        if length >= PAGE_CHARS or entry is entries[-1]:
            documents.append(Document(name=page[0].split("\n", 1)[0], text="".join(page)))
            page, length = [], 0
    return documents


def python() -> Corpus:
    """The Python source of the running interpreter's standard library; a document is a file."""
    root = Path(sysconfig.get_path("stdlib"))
    documents: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if NOT_PROSE.isdisjoint(name.parts) and not name.as_posix().startswith(MACHINE_OWN):
            text = path.read_text(encoding="utf-8")
            if text.strip():
                documents.append(Document(name=name.as_posix(), text=text))
    return Corpus(
        domain="python",
        documents=tuple(documents),
        source=f"standard library of CPython {platform.python_version()}",
        licence="PSF License Version 2",
    )


def debian_package(name: str, cache: Path) -> Path:
    """Download and unpack (never install) a Debian package; return the folder that holds its files."""
    root = cache / name
    if root.is_dir():
        return root
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ConfigError(f"package {name}: {tool} was not found; train on a Debian or Ubuntu machine")
    cache.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["apt-get", "download", name], cwd=cache, capture_output=True, text=True, check=False)
    archives = sorted(cache.glob(f"{name}_*.deb"))
    if done.returncode != 0 or not archives:
        reason = (done.stderr.strip().splitlines() or ["no archive came"])[-1]
        raise ConfigError(f"package {name}: apt-get download failed ({reason}); run `apt-get update` and try again")
    # Unpacked aside and renamed, so that a folder that exists is always whole.
    partial = cache / f"{name}.partial"
    subprocess.run(["dpkg-deb", "-x", str(archives[-1]), str(partial)], check=True)
    partial.rename(root)
    return root


def package_version(name: str, cache: Path) -> str:
    """Return the version of a package that `debian_package` got."""
    archive = sorted(cache.glob(f"{name}_*.deb"))[-1]
    command = ["dpkg-deb", "-f", str(archive), "Version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
