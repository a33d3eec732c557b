"""Where a guest's second-level paging begins: the one thing an analyst, a control structure or a configuration names.

A :class:`Root` is written as text, and read back from it, in the form that ``--guest`` takes::

    eptp=0xfadf05e
    ncr3=0x2a17000,levels=5,maxphyaddr=48,cbit=47
    eptp=0xfadf000,dialect=kvm
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from volatility3_ept.core import leaves
from volatility3_ept.core import walk as walks
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.spec import bits, ept, npt
from volatility3_ept.spec.dialect import DIALECTS, Dialect
from volatility3_ept.spec.paging import Format

EPT = "EPT"
NPT = "NPT"
_REGISTERS = {"eptp": EPT, "ncr3": NPT}
_NUMBERS = {"levels": "levels", "maxphyaddr": "physical_bits", "cbit": "key_bit"}


class RootError(ValueError):
    """A root that cannot be: the message says what is wrong with it, in one line."""


@dataclass(frozen=True)
class Root:
    """An EPT or NPT root. ``raw`` is the EPTP or nCR3 as the control structure holds it.

    ``levels`` 0 means: from the EPTP's page-walk length, and 4 for NPT. ``physical_bits`` is MAXPHYADDR; 0 means not
    known. ``key_bit`` is the lowest address bit that carries a key: the C-bit, or the first MKTME KeyID bit.
    ``dialect`` names the hypervisor's way to write entries; empty means: infer it from the tables.
    """

    kind: str
    raw: int
    levels: int = 0
    physical_bits: int = 0
    key_bit: int = 0
    mode_based_execute: bool = False
    dialect: str = ""

    def __post_init__(self) -> None:
        """Fill in the number of levels; RootError when this cannot be a root."""
        if self.kind not in (EPT, NPT):
            raise RootError(f"{self.kind} is neither {EPT} nor {NPT}")
        if not self.levels:
            # An analyst who knows only the table's address gives no low bits: four levels is what nearly all use.
            from_eptp = ept.Eptp(self.raw).levels if self.kind == EPT and self.raw & 0xFFF else 4
            object.__setattr__(self, "levels", from_eptp)
        allowed = (4, 5) if self.kind == EPT else (2, 3, 4, 5)
        if self.levels not in allowed:
            raise RootError(f"{self.kind} root {self.raw:#x}: {self.levels} levels; possible: {allowed}")
        if self.physical_bits and not 32 <= self.physical_bits <= bits.MAX_PHYSICAL_BITS:
            raise RootError(f"MAXPHYADDR is 32 to {bits.MAX_PHYSICAL_BITS}, not {self.physical_bits}")
        if self.key_bit and not bits.PAGE_SHIFT <= self.key_bit < bits.MAX_PHYSICAL_BITS:
            raise RootError(f"cbit is {bits.PAGE_SHIFT} to {bits.MAX_PHYSICAL_BITS - 1}, not {self.key_bit}")
        if self.raw < 0 or self.raw >> 64 or not self.address:
            raise RootError(f"{self.kind} root {self.raw:#x} holds no table address")
        if self.dialect:
            who = DIALECTS.get(self.dialect.lower())
            if who is None:
                raise RootError(f"dialect {self.dialect!r}; known: {', '.join(sorted(DIALECTS))}")
            object.__setattr__(self, "dialect", who.name)

    @classmethod
    def parse(cls, text: str) -> Root:
        """Return the root that a text names; RootError with one clear line when it names none."""
        head, *rest = (part.strip() for part in text.split(","))
        register, _, value = head.partition("=")
        kind = _REGISTERS.get(register.strip().lower())
        if kind is None:
            raise RootError(f"{text!r} is not a root: write eptp=ADDRESS or ncr3=ADDRESS")
        options: dict[str, object] = {}
        for part in rest:
            key, _, given = part.partition("=")
            if key in _NUMBERS:
                options[_NUMBERS[key]] = _number(given, part)
            elif key == "dialect":
                options["dialect"] = given
            elif key == "mbec":
                options["mode_based_execute"] = _number(given or "1", part) != 0
            else:
                raise RootError(f"{part!r} in {text!r}; possible: levels=, maxphyaddr=, cbit=, mbec=, dialect=")
        return cls(kind, _number(value, head), **options)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Return the text that :meth:`parse` reads back to an equal root."""
        parts = [f"{'eptp' if self.kind == EPT else 'ncr3'}={self.raw:#x}"]
        implied = replace(self, levels=0).levels if self.kind == NPT or self.raw & 0xFFF == 0 else self._eptp_levels
        if self.levels != implied:
            parts.append(f"levels={self.levels}")
        parts += [f"{key}={getattr(self, name)}" for key, name in _NUMBERS.items() if key != "levels"
                  and getattr(self, name)]  # fmt: skip
        if self.mode_based_execute:
            parts.append("mbec=1")
        if self.dialect:
            parts.append(f"dialect={self.dialect.lower()}")
        return ",".join(parts)

    @property
    def _eptp_levels(self) -> int:
        return ept.Eptp(self.raw).levels

    @property
    def address(self) -> int:
        """Address of the top table, in the space that holds the tables (host-physical unless nested)."""
        return self.format.root_hpa(self.raw)

    @property
    def format(self) -> Format:
        """The format of the hierarchy."""
        width = self.physical_bits or bits.MAX_PHYSICAL_BITS
        if self.kind == EPT:
            plain = ept.ept_format(self.levels, width, self.mode_based_execute)
            return replace(plain, key_bits=self._key_bits)
        return npt.npt_format(self.levels, width, self._key_bits)

    @property
    def _key_bits(self) -> int:
        if not self.key_bit:
            return 0
        # The C-bit is one bit, with reserved ones beside it; a KeyID takes all that are left below MAXPHYADDR.
        if self.kind == NPT:
            return bits.bit(self.key_bit)
        return bits.field(self.physical_bits - 1 if self.physical_bits > self.key_bit else 51, self.key_bit)

    def resolved(self, memory: HostMemory) -> Root:
        """Return the same root with its dialect inferred from the tables, if it had none."""
        if self.dialect:
            return self
        return replace(self, dialect=leaves.infer_dialect(memory, self.format, self.raw).name)

    def reader(self, memory: HostMemory) -> Dialect:
        """Return the dialect in which the tables are to be read."""
        return DIALECTS[self.resolved(memory).dialect.lower()]

    def fingerprint(self, memory: HostMemory) -> str:
        """Return a short hash of the top table: a saved root must meet the same table again. Empty if unreadable."""
        table = memory.read(self.address, self.format.entry_bytes * self.format.levels[0].entries)
        return "" if table is None else hashlib.sha256(table).hexdigest()[:16]

    def traverse(self, memory: HostMemory) -> GuestMap:
        """Return everything that the hierarchy maps. ``memory`` holds its tables.

        A map that somebody still holds is not made again: of a large guest two would take gigabytes.
        """
        root = self.resolved(memory)
        name = (root.format, root.address, root.dialect)
        found = memory.maps.get(name)
        if found is None:
            found = memory.maps[name] = leaves.traverse(memory, self.format, self.raw, root.reader(memory))
        return found

    def walk(self, memory: HostMemory, gpa: int) -> walks.Walk:
        """Translate one guest-physical address, keeping every entry."""
        return walks.walk(memory, self.format, self.raw, gpa, self.reader(memory))


def _number(text: str, where: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise RootError(f"{where!r}: {text!r} is not a number (0x for hexadecimal)") from None
