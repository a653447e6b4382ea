"""The Lua scripts, and the names of the keys they work on."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from .client import Argument, Link

__all__ = ["Keys", "Script", "load"]


@dataclass(frozen=True, slots=True)
class Script:
    name: str
    text: str
    sha: str

    def __call__(self, link: Link, keys: list[str], *arguments: Argument) -> Any:
        """Send it on `link`; a future."""
        return link.call("EVALSHA", self.sha, len(keys), *keys, *arguments)


def load() -> dict[str, Script]:
    """Every script by name, each with what it names of the shared functions in `add.lua`."""
    folder = files(__package__) / "lua"
    shared = _functions((folder / "add.lua").read_text())
    scripts = {}
    for file in folder.iterdir():
        name = file.name.removesuffix(".lua")
        if file.name.endswith(".lua") and name != "add":
            text = _with_shared(file.read_text(), shared)
            scripts[name] = Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
    return scripts


def _functions(text: str) -> dict[str, str]:
    """The functions of a file by name, in order."""
    return {found[1]: found[0] for found in re.finditer(r"^local function (\w+).*?^end\n", text, re.M | re.S)}


def _with_shared(script: str, shared: dict[str, str]) -> str:
    placed = re.compile(r"^ *-- here: (.*)\n", re.M)
    chosen = {name for names in placed.findall(script) for name in names.split(", ")}
    text = placed.sub(lambda match: "".join(shared[name] for name in match[1].split(", ")), script)
    for name, function in reversed(shared.items()):  # a function names only those above it
        if name not in chosen and re.search(rf"\b{name}\(", text):
            text = function + text
    return text


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one partition of a channel; one hash tag, so one cluster slot."""

    base: str

    @classmethod
    def of(cls, channel: str, partition: int = 0) -> Keys:
        return cls(f"pipeline:{{{channel}}}" if partition == 0 else f"pipeline:{{{channel}#{partition}}}")

    @property
    def stream(self) -> str:
        return f"{self.base}:s"

    @property
    def meta(self) -> str:
        return f"{self.base}:m"

    @property
    def groups(self) -> str:
        return f"{self.base}:g"

    def source(self, source: str) -> str:
        return f"{self.base}:src:{source}"

    def group(self, group: str, part: str) -> str:
        """`part`: h counters · prog progress · due, bod, takes events that wait apart · settled dead letters."""
        return f"{self.base}:g:{group}:{part}"
