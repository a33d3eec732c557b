"""Linux guests: whose symbol table is needed, and whether Volatility took the right one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volatility3.framework import interfaces
from volatility3.framework.automagic import linux, symbol_cache

from volatility3_ept.automagic import missing
from volatility3_ept.layers import discovery

if TYPE_CHECKING:
    from volatility3_ept.core.identify import Identity

_HOW = (
    "Put it into DIR/linux/ under any name that ends in .json.xz, and run vol with -s DIR. "
    "docs/isf-from-btf.md tells how to make one without debug packages."
)
#: Texts that are listed where several may be the kernel's.
_LISTED = 6


def explain(guest: missing.Guest, found: Identity) -> str:
    """Say which kernel's symbol table (ISF) is needed, and where it is to be put."""
    known = banners()
    held = [text for text in found.banners if text in known]
    if held:
        return (
            f"there is a symbol table (ISF) for {held[0]}\nbut Volatility could not build the kernel's address space "
            f"with it ({found.why}; -vvv shows its attempts)"
        )
    whose = "host's" if guest.wanted.strip().lower() == discovery.HOST else "guest's"
    return f"no symbol table (ISF) for the {whose} kernel. {_needed(found)}\n{_HOW}{_near(found, known)}"


def check(context: interfaces.context.ContextInterface, guest: missing.Guest) -> str | None:
    """Return what is wrong where Volatility chose the symbol table of a kernel that is not the guest's own.

    It takes the first banner in memory that it has a table for, and a banner may lie in a file or a log. Nothing is
    said where the guest's page tables do not show which kernel runs.
    """
    key = linux.LinuxSymbolFinder.banner_config_key
    texts = [str(context.layers[name].config.get(key, "")) for name in context.layers]
    chosen = next((text.strip("\n\0") for text in texts if text), None)
    found = guest.running() if chosen else None
    if found is None or chosen is None or found.family != "linux" or chosen in found.texts:
        return None
    known = banners()
    if any(text in known for text in found.banners):
        remedy = "Its table is there too: leave it alone in the folder that -s names."
    else:
        remedy = _HOW
    head = "Volatility took the symbol table of another kernel, whose banner lies in the guest's memory"
    return f"{head}:\n  {chosen}\n{_needed(found)}\n{remedy}"


def banners() -> set[str]:
    """Return the banners that Volatility has a Linux symbol table for, without the newline and zero at their ends."""
    known = symbol_cache.load_cache_manager().get_identifier_dictionary(operating_system="linux")
    return {banner.decode("latin-1").strip("\n\0") for banner in known if banner}


def _needed(found: Identity) -> str:
    texts = found.banners[:_LISTED]
    more = f"\n  ... and {len(found.banners) - _LISTED} more" if len(found.banners) > _LISTED else ""
    head = "It must be of exactly this build" if len(texts) == 1 else "Its memory names several; it is one of"
    return f"{head}:" + "".join(f"\n  {text}" for text in texts) + f"{more}\n  ({found.why})"


def _near(found: Identity, known: set[str]) -> str:
    release = " ".join(found.banners[0].split(" ", 3)[:3]) + " " if found.banners else ""
    if release and any(text.startswith(release) for text in known):
        return "\nThe table that is there for another build of this release does not fit."
    return ""


missing.EXPLAINERS["linux"] = explain
