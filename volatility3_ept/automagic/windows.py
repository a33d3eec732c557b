"""Windows guests: the address space of the kernel that the guest's registers lead to, and its symbols.

Volatility's own stacker comes after ours. A table that maps itself and the shared page may be another machine's: that
of a guest in this guest, or what a crashed system left behind. The registers of a vCPU belong to no other machine, and
what they lead to is checked to the end: a kernel image with its header and its PDB record, through the same tables. So
where both find something and disagree, ours is right, and a warning names the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from volatility3.framework import constants, interfaces
from volatility3.framework.automagic import pdbscan, symbol_cache
from volatility3.framework.layers import intel
from volatility3.framework.symbols.windows import WindowsKernelIntermedSymbols

from volatility3_ept.automagic import missing
from volatility3_ept.layers import guest, options, windows

if TYPE_CHECKING:
    from volatility3_ept.core.identify import Identity
    from volatility3_ept.core.rsds import Pdb
    from volatility3_ept.core.windows import Kernel

vollog = logging.getLogger(__name__)

#: The kernel that was found in the guest whose layer was stacked last, and that guest's id.
_last: list[tuple[str, Kernel]] = []


class GuestWindowsStacker(interfaces.automagic.StackerLayerInterface):
    """Stacks a Windows layer on the layer that ``--guest`` put there, where a Windows kernel is found in the guest."""

    # Above our own (30), below every operating system's of Volatility's (34 and more).
    stack_order = 32
    exclusion_list: ClassVar[list[str]] = ["linux", "mac"]

    @classmethod
    def stack(
        cls,
        context: interfaces.context.ContextInterface,
        layer_name: str,
        progress_callback: constants.ProgressCallback = None,
    ) -> interfaces.layers.DataLayerInterface | None:
        """Return the virtual layer of the guest's kernel; None where it runs no Windows.

        Raises:
            GuestError: the configuration of the guest's layer is damaged.
        """
        base = context.layers[layer_name]
        if not isinstance(base, guest.GuestPhysicalLayer):
            return None
        name = base.config.get("guest", "?")
        if _runs_something_else(name):
            return None
        _last.clear()
        kernel = windows.kernel(base)
        layer = windows.virtual_layer(context, base, kernel) if kernel else None
        if kernel is None or layer is None:
            return None
        _last.append((name, kernel))
        vollog.info("guest %s: %s: %s", name, kernel.name, kernel.why)
        other = windows.misleading(base.memory, kernel)
        if other is not None:
            vollog.warning(
                "guest %s: the page tables at %#x, which Volatility's own search would take, are not those of the "
                "guest's kernel; those at %#x are used: %s",
                name, other, layer.config["page_map_offset"], kernel.why,
            )  # fmt: skip
        return layer


def _runs_something_else(name: str) -> bool:
    """Tell whether the search is certain of another system in this guest: it need not be searched again."""
    chosen = missing.recall(name)
    machine = chosen.machine if chosen else None
    if machine is None or machine.system.startswith("Windows"):
        return False
    return any(item.name == "system" and item.held for item in machine.evidence)


class GuestWindowsKernel(pdbscan.KernelPDBScanner):
    """Loads the symbols of the kernel at the address that the stacker found; nothing is searched.

    Volatility's own scanner comes later (30) and does nothing where this one succeeds.
    """

    priority = 25

    def __call__(
        self,
        context: interfaces.context.ContextInterface,
        config_path: str,
        requirement: interfaces.configuration.RequirementInterface,
        progress_callback: constants.ProgressCallback = None,
    ) -> None:
        """Fulfil the plugin's symbol requirements where ``--guest`` or a configuration has put a guest's layer."""
        asked = options.wanted(context) is not None
        if asked or any(isinstance(context.layers[name], guest.GuestPhysicalLayer) for name in context.layers):
            super().__call__(context, config_path, requirement, progress_callback)

    def method_known_base(
        self,
        context: interfaces.context.ContextInterface,
        vlayer: intel.Intel,
        progress_callback: constants.ProgressCallback = None,
    ) -> tuple[str, int, dict[str, Any]] | None:
        """Return the layer, the kernel's address and its PDB, in the form of Volatility's own methods.

        None for a secure kernel: Volatility's plugins would read an ordinary one's structures there.
        """
        from volatility3_ept.core import rsds

        base = vlayer.config.get("kernel_virtual_offset", None)
        if base is None or not isinstance(vlayer, (intel.WindowsIntel, intel.WindowsIntelPAE, intel.WindowsIntel32e)):
            return None
        image = windows.image_at(vlayer, base)
        pdb = image.pdb if image else None
        if pdb is None or pdb.stem not in rsds.KERNELS:
            return None
        return vlayer.name, base, {"GUID": pdb.guid, "age": pdb.age, "pdb_name": pdb.name, "mz_offset": base}

    methods: ClassVar[list[Callable[..., Any]]] = [method_known_base]


def explain(chosen: missing.Guest, found: Identity) -> str:
    """Say which kernel's symbol table (ISF) is needed, and where it is to be put."""
    kernel = _known(chosen)
    pdb = kernel.image.pdb if kernel else None
    if kernel is None or pdb is None:
        return f"no symbol table (ISF) can be named for {found.name}: {kernel.why if kernel else found.why}"
    if kernel.space is None:
        return f"{kernel.name}: its image is in memory, but no page tables that map it were found ({kernel.why})"
    if kernel.is_secure:
        return f"{kernel.name}: this view of the machine is virtual trust level 1, in which no ordinary kernel runs"
    if _isf(pdb) is not None:
        return f"{kernel.name}: its symbol table is there, but Volatility could not use it ({kernel.why}; -vvv tells)"
    return (
        f"no symbol table (ISF) for the guest's kernel, {kernel.name}.\n"
        f"It must be of exactly this build: PDB {pdb.name}, GUID {pdb.guid}, age {pdb.age}.\n"
        f"Put it at DIR/{pdb.isf} and run vol with -s DIR. On a machine with a network connection this makes it:\n"
        f"  python -m volatility3.framework.symbols.windows.pdbconv -p {pdb.name} -g {pdb.guid}{pdb.age} "
        f"-o {pdb.guid}-{pdb.age}.json.xz\n"
        f"docs/windows-guests.md tells more.\n({kernel.why})"
    )


def check(context: interfaces.context.ContextInterface, chosen: missing.Guest) -> str | None:
    """Return what is wrong where Volatility took another kernel than the guest's, or another kernel's symbols.

    Its scanner goes on where the symbols of the right one are missing, and a file in a cache has a header and a PDB
    record. After a download that failed it takes a symbol table by its file's name alone.
    """
    kernel = _stacked(chosen.wanted)
    if kernel is None or kernel.base is None or kernel.space is None:
        return None
    base = kernel.space.plain(kernel.base)
    for name in context.layers:
        layer = context.layers[name]
        taken = layer.config.get("kernel_virtual_offset", None) if isinstance(layer, intel.WindowsMixin) else None
        if taken is not None and taken != base:
            return f"Volatility took an image at {taken:#x} for the kernel, and the guest's is at {base:#x}: " \
                   f"{explain(chosen, chosen.identity())}"  # fmt: skip
    for name in context.symbol_space:
        table = context.symbol_space[name]
        held = getattr(table.metadata, "pdb_guid", None) if isinstance(table, WindowsKernelIntermedSymbols) else None
        if held is not None and kernel.image.pdb is not None and str(held).upper() != kernel.image.pdb.guid:
            return f"{table.config['isf_url']} is the symbol table of another build, whatever its name says: " \
                   f"{explain(chosen, chosen.identity())}"  # fmt: skip
    return None


def _stacked(wanted: str) -> Kernel | None:
    """Return the kernel whose layer was stacked for this guest."""
    return next((kernel for name, kernel in _last if name == wanted), None)


def _known(chosen: missing.Guest) -> Kernel | None:
    kernel = _stacked(chosen.wanted)
    if kernel is not None:
        return kernel
    from volatility3_ept.core import guestvirtual
    from volatility3_ept.core import windows as kernels

    machine = chosen.machine
    if machine is None:
        return kernels.find(chosen.memory)
    return kernels.find(chosen.memory, machine.paging, machine.spaces, guestvirtual.states(machine))


def _isf(pdb: Pdb) -> str | None:
    """Return where Volatility has the symbol table of a PDB; None where it has none."""
    key = symbol_cache.WindowsIdentifier.generate(pdb.name, pdb.guid, pdb.age)
    where: str | None = symbol_cache.load_cache_manager().find_location(key, "windows")
    return where


missing.EXPLAINERS["windows"] = explain
