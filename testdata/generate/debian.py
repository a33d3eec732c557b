"""What the captures are made of: Debian's packages, small C programs, initramfs images.

Everything comes from the machine's own apt sources. Kernels and busybox are only
unpacked, never installed.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

GUEST_SOURCES = Path(__file__).resolve().parent / "guest"
PROGRAMS = ("report", "marker", "vmm", "inner")

COMPILER_PACKAGES = ("gcc", "libc6-dev", "linux-libc-dev", "binutils")
QEMU_PACKAGES = ("qemu-system-x86", "qemu-system-data", "seabios")
BOCHS_PACKAGES = ("bochs", "bochs-x", "bochsbios", "vgabios", "xorriso", "isolinux", "syslinux-common")

MICROVM = Path("/usr/bin/qemu-system-x86_64-microvm")
QEMU_FIRMWARE = ("qboot.rom", "linuxboot_dma.bin", "linuxboot.bin", "pvh.bin", "kvmvapic.bin")
KERNEL_MODULES = (
    "virt/lib/irqbypass",
    "arch/x86/kvm/kvm",
    "arch/x86/kvm/kvm-intel",
    "arch/x86/kvm/kvm-amd",
)


class MissingPackageError(RuntimeError):
    """A package is neither installed nor to be had."""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command and return what it prints; its complaint is part of the error."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed ({done.returncode}): {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def is_installed(package: str) -> bool:
    """Return whether dpkg has the package configured."""
    status = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status}", package],
        capture_output=True,
        text=True,
        check=False,
    )
    return status.stdout == "installed"


def version(package: str) -> str:
    """Return the installed version of a package."""
    return run("dpkg-query", "-W", "-f", "${Version}", package)


def install(packages: Sequence[str]) -> None:
    """Install what is missing, or say what is."""
    missing = [package for package in packages if not is_installed(package)]
    if not missing:
        return
    if os.geteuid():
        raise MissingPackageError(f"not installed, and this is not root: apt-get install {' '.join(missing)}")
    run(
        "env",
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "install",
        "-y",
        "-qq",
        "--no-install-recommends",
        *missing,
    )


def unpack(package: str, work: Path) -> Path:
    """Download a package and return the directory with its files."""
    target = work / "packages" / package
    if not target.exists():
        downloads = work / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        found = sorted(downloads.glob(f"{package}_*.deb"))
        if not found:
            try:
                run("apt-get", "download", "-qq", package, cwd=downloads)
            except RuntimeError as error:
                raise MissingPackageError(f"{package}: {error}") from error
            found = sorted(downloads.glob(f"{package}_*.deb"))
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        run("dpkg-deb", "-x", found[-1], partial)
        (partial / "VERSION").write_text(run("dpkg-deb", "-f", found[-1], "Version").strip())
        partial.rename(target)
    return target


class Kernel:
    """A Debian kernel package, unpacked."""

    def __init__(self, release: str, work: Path) -> None:
        """Unpack ``linux-image-RELEASE`` below ``work``."""
        self.release = release
        self.root = unpack(f"linux-image-{release}", work)
        self.image = self.root / "boot" / f"vmlinuz-{release}"
        self.modules = self.root / "lib" / "modules" / release / "kernel"

    def module_btf(self, module: str) -> bytes:
        """Return the ``.BTF`` section of one of KVM's modules."""
        path = next(self.modules / f"{name}.ko" for name in KERNEL_MODULES if name.endswith(f"/{module}"))
        section = self.root / f"{module}.btf"
        run(
            "objcopy",
            "-O",
            "binary",
            "--only-section=.BTF",
            "--set-section-flags",
            ".BTF=alloc",
            path,
            section,
        )
        return section.read_bytes()

    def describe(self) -> str:
        """Return package and version, for the manifest."""
        return f"linux-image-{self.release} {(self.root / 'VERSION').read_text()}"

    def module_files(self, work: Path) -> dict[str, bytes]:
        """Return KVM's modules without their debug sections, as files below ``modules/``."""
        files = {}
        for module in KERNEL_MODULES:
            stripped = work / "stripped.ko"
            run("strip", "--strip-debug", "-o", stripped, self.modules / f"{module}.ko")
            files[f"modules/{Path(module).name}.ko"] = stripped.read_bytes()
        return files


def programs(work: Path) -> dict[str, bytes]:
    """Compile the C programs; return their contents by name."""
    built = {}
    for name in PROGRAMS:
        target = work / "programs" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        run("gcc", "-O2", "-static", "-s", "-Wall", "-o", target, GUEST_SOURCES / f"{name}.c")
        built[name] = target.read_bytes()
    return built


def busybox(work: Path) -> bytes:
    """Return a static busybox."""
    root = unpack("busybox-static", work)
    found = [path for path in (root / "bin/busybox", root / "usr/bin/busybox") if path.exists()]
    return found[0].read_bytes()


def microvm_files() -> dict[str, bytes]:
    """Return Debian's small QEMU with its libraries and firmware."""
    files = {str(MICROVM).lstrip("/"): MICROVM.read_bytes()}
    for line in run("ldd", MICROVM).splitlines():
        words = line.split()
        if "=>" in words:
            library = Path(words[words.index("=>") + 1])
            files[f"lib/{library.name}"] = library.read_bytes()
    files["lib64/ld-linux-x86-64.so.2"] = Path("/lib64/ld-linux-x86-64.so.2").read_bytes()
    for firmware in QEMU_FIRMWARE:
        files[f"usr/share/qemu/{firmware}"] = (Path("/usr/share/qemu") / firmware).read_bytes()
    return files


def initramfs(files: Mapping[str, bytes | str], level: int = 9) -> bytes:
    """Return a gzipped cpio archive ("newc") of executable files, their directories and a console.

    A value of type ``str`` is the target of a symbolic link.
    """
    directories = {str(parent) for name in files for parent in Path(name).parents if str(parent) != "."}
    chunks: list[bytes] = []

    def add(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        fields = (len(chunks) + 1, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        chunks.append(header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4))

    for directory in sorted({*directories, "dev"}):
        add(directory, 0o40755)
    add("dev/console", 0o20600, device=(5, 1))
    for name, data in sorted(files.items()):
        if isinstance(data, str):
            add(name, 0o120777, data.encode())
        else:
            add(name, 0o100755, data)
    add("TRAILER!!!", 0)
    return gzip.compress(b"".join(chunks), level, mtime=0)


class Ingredients:
    """The compiled programs and the shell that every initramfs takes from."""

    def __init__(self, work: Path) -> None:
        """Compile and unpack."""
        self.work = work
        self.tools = programs(work)
        self.shell = busybox(work)

    def base(self, init: str, *names: str) -> dict[str, bytes | str]:
        """Return the shell, the first process, and the named programs; a marker is one program."""
        files: dict[str, bytes | str] = {
            "bin/busybox": self.shell,
            "init": (GUEST_SOURCES / init).read_bytes(),
            "bin/marker": self.tools["marker"],
        }
        for name in names:
            files[f"bin/{name}"] = self.tools.get(name, "marker")
        return files

    def symbols(self) -> bytes:
        """Return the initramfs of a machine that tells its symbols."""
        return initramfs(self.base("symbols-init", "report"))

    def guest(self, kernel: Kernel, nested: bool) -> bytes:
        """Return the initramfs of a guest; with KVM if it is to run one itself."""
        files = self.base("guest-init", "guest_marker_a", "guest_marker_b", "guest_db_server", "guest_spin")
        if nested:
            files |= {name: self.tools[Path(name).name] for name in ("bin/inner", "bin/report")}
            files |= kernel.module_files(self.work)
        return initramfs(files)

    def host(self, kernel: Kernel, guests: Mapping[str, tuple[Kernel, bool]], conf: str, with_qemu: bool) -> bytes:
        """Return the initramfs of a host, with kernel and initramfs of its guests (kernel, nested?)."""
        files = self.base("host-init", "report", "vmm", "host_marker_a", "host_marker_b")
        files |= {"capture.conf": conf.encode()} | kernel.module_files(self.work)
        if with_qemu:
            files |= microvm_files()
        for name, (guest, nested) in guests.items():
            files[f"guest/{guest.release}"] = guest.image.read_bytes()
            files[f"guest/initrd-{name}.gz"] = self.guest(guest, nested)
        return initramfs(files, level=1)
