"""The types of a small Windows kernel, and the symbol table (ISF) that describes them to Volatility.

Offsets are those of a 64-bit Windows 10 where a type is written in full; nothing of the package is imported.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

from .windows_pe import Pe

_BASE = {
    "char": (1, True, "char"), "unsigned char": (1, False, "char"), "short": (2, True, "int"),
    "unsigned short": (2, False, "int"), "wchar": (2, False, "int"), "int": (4, True, "int"),
    "unsigned int": (4, False, "int"), "long": (4, True, "int"), "unsigned long": (4, False, "int"),
    "long long": (8, True, "int"), "unsigned long long": (8, False, "int"), "pointer": (8, False, "int"),
    "void": (0, False, "void"),
}  # fmt: skip
_SHORT = {"u8": "unsigned char", "c": "char", "u16": "unsigned short", "u32": "unsigned long", "i32": "long",
          "u64": "unsigned long long", "i64": "long long", "void": "void"}  # fmt: skip

#: Type: size, then fields as ``name offset type``: a base type, ``*type``, ``_NAME``, ``n[type``, ``base:bit:length``.
TYPES = {
    "_LIST_ENTRY": (0x10, "Flink 0 *_LIST_ENTRY, Blink 8 *_LIST_ENTRY"),
    "_POOL_HEADER": (0x10, "PoolIndex 0 u16:8:8, BlockSize 2 u16:0:8, PoolType 2 u16:8:8, PoolTag 4 u32"),
    "_POOL_TRACKER_BIG_PAGES": (0x20, "Va 0 u64, Key 8 u32, PoolType c u32"),
    "_UNICODE_STRING": (0x10, "Length 0 u16, MaximumLength 2 u16, Buffer 8 *u16"),
    "_LARGE_INTEGER": (8, "QuadPart 0 i64, LowPart 0 u32, HighPart 4 i32"),
    "_KSYSTEM_TIME": (12, "LowPart 0 u32, High1Time 4 i32, High2Time 8 i32"),
    "_QUAD": (8, "UseThisFieldToCopy 0 i64"),
    "_KPROCESS": (0x438, "DirectoryTableBase 28 u64"),
    "_EPROCESS": (0xA40, "Pcb 0 _KPROCESS, UniqueProcessId 440 *void, ActiveProcessLinks 448 _LIST_ENTRY, "
        "CreateTime 468 _LARGE_INTEGER, InheritedFromUniqueProcessId 540 *void, Peb 550 *_PEB, "
        "Session 558 *void, ObjectTable 570 *_HANDLE_TABLE, WoW64Process 580 *void, ImageFileName 5a8 f[c, "
        "SeAuditProcessCreationInfo 5c0 _SE_AUDIT_PROCESS_CREATION_INFO, ThreadListHead 5e0 _LIST_ENTRY, "
        "ActiveThreads 5f0 u32, VadRoot 7d8 _RTL_AVL_TREE, ExitTime 840 _LARGE_INTEGER"),
    "_SE_AUDIT_PROCESS_CREATION_INFO": (8, "ImageFileName 0 *_OBJECT_NAME_INFORMATION"),
    "_OBJECT_NAME_INFORMATION": (0x10, "Name 0 _UNICODE_STRING"),
    "_MM_SESSION_SPACE": (0x10, "SessionId 8 u32"),
    "_PEB": (0x7C8, "ProcessParameters 20 *_RTL_USER_PROCESS_PARAMETERS"),
    "_RTL_USER_PROCESS_PARAMETERS": (0x440, "ImagePathName 60 _UNICODE_STRING, CommandLine 70 _UNICODE_STRING"),
    "_HANDLE_TABLE": (0x80, "TableCode 8 u64, HandleCount 3c i32"),
    "_HANDLE_TABLE_ENTRY": (0x10, "ObjectPointerBits 0 u64:20:44, GrantedAccessBits 8 u32:0:25"),
    "_OBJECT_HEADER": (0x38, "PointerCount 0 i64, HandleCount 8 i64, TypeIndex 18 u8, InfoMask 1a u8, Body 30 _QUAD"),
    "_OBJECT_HEADER_NAME_INFO": (0x20, "Directory 0 *void, Name 8 _UNICODE_STRING"),
    "_OBJECT_TYPE": (0xD8, "Name 10 _UNICODE_STRING, Index 28 u8"),
    "_RTL_AVL_TREE": (8, "Root 0 *_RTL_BALANCED_NODE"),
    "_RTL_BALANCED_NODE": (0x18, "Left 0 *_RTL_BALANCED_NODE, Right 8 *_RTL_BALANCED_NODE, ParentValue 10 u64"),
    "_MMVAD_FLAGS": (4, "Protection 0 u32:7:5, PrivateMemory 0 u32:20:1"),
    "_MMVAD_FLAGS1": (4, "CommitCharge 0 u32:0:31"),
    "_VAD_U": (4, "VadFlags 0 _MMVAD_FLAGS"),
    "_VAD_U1": (4, "VadFlags1 0 _MMVAD_FLAGS1"),
    "_MMVAD_SHORT": (0x40, "VadNode 0 _RTL_BALANCED_NODE, StartingVpn 18 u32, EndingVpn 1c u32, "
        "StartingVpnHigh 20 u8, EndingVpnHigh 21 u8, u 30 _VAD_U, u1 34 _VAD_U1"),
    "_MMVAD": (0x88, "Core 0 _MMVAD_SHORT, Subsection 48 *_SUBSECTION"),
    "_SUBSECTION": (0x38, "ControlArea 0 *_CONTROL_AREA"),
    "_CONTROL_AREA": (0x80, "FilePointer 40 _EX_FAST_REF"),
    "_EX_FAST_REF": (8, "Object 0 *void"),
    "_FILE_OBJECT": (0xD8, "FileName 58 _UNICODE_STRING"),
    "_KLDR_DATA_TABLE_ENTRY": (0xA0, "InLoadOrderLinks 0 _LIST_ENTRY, DllBase 30 *void, EntryPoint 38 *void, "
        "SizeOfImage 40 u32, FullDllName 48 _UNICODE_STRING, BaseDllName 58 _UNICODE_STRING"),
    "_DBGKD_GET_VERSION64": (0x28, "MajorVersion 0 u16, MinorVersion 2 u16, MachineType 8 u16, KernBase 10 u64, "
        "PsLoadedModuleList 18 u64, DebuggerDataList 20 u64"),
    "_KUSER_SHARED_DATA": (0x720, "SystemTime 14 _KSYSTEM_TIME, NtSystemRoot 30 104[wchar, NtBuildNumber 260 u32, "
        "NtProductType 264 _NT_PRODUCT_TYPE, NtMajorVersion 26c u32, NtMinorVersion 270 u32"),
}  # fmt: skip
#: Types that Volatility wants to know of, and that no test reads.
_EMPTY = """_ETHREAD _KTHREAD _ERESOURCE _TOKEN _DEVICE_OBJECT _CM_KEY_BODY _CMHIVE _CM_KEY_NODE _CM_KEY_VALUE
_HMAP_ENTRY _KMUTANT _DRIVER_OBJECT _OBJECT_SYMBOLIC_LINK _SHARED_CACHE_MAP _VACB
_IMAGE_DOS_HEADER _KTIMER _LDR_DATA_TABLE_ENTRY"""


def offset(name: str, field: str) -> int:
    """Return the offset of a field."""
    return int(_fields(name)[field][0], 16)


def _fields(name: str) -> dict[str, tuple[str, str]]:
    rows = (row.split() for row in TYPES[name][1].split(", "))
    return {field: (at, kind) for field, at, kind in rows}


def _kind(text: str) -> dict[str, Any]:
    if text.startswith("*"):
        return {"kind": "pointer", "subtype": _kind(text[1:])}
    if "[" in text:
        count, _, of = text.partition("[")
        return {"kind": "array", "count": int(count, 16), "subtype": _kind(of)}
    if ":" in text:
        base, bit, length = text.split(":")
        return {"kind": "bitfield", "bit_position": int(bit), "bit_length": int(length), "type": _kind(base)}
    if text == "_NT_PRODUCT_TYPE":
        return {"kind": "enum", "name": text}
    return (
        {"kind": "struct", "name": text} if text.startswith("_") else {"kind": "base", "name": _SHORT.get(text, text)}
    )


def isf(symbols: dict[str, int], pe: Pe) -> dict[str, Any]:
    """Return the symbol table of a kernel: ``symbols`` by RVA."""
    types = {
        name: {
            "kind": "struct",
            "size": size,
            "fields": {f: {"offset": int(at, 16), "type": _kind(kind)} for f, (at, kind) in _fields(name).items()},
        }
        for name, (size, _) in TYPES.items()
    }
    types |= {name: {"kind": "struct", "size": 8, "fields": {}} for name in _EMPTY.split()}
    major, minor, build, revision = pe.version
    return {
        "metadata": {
            "format": "6.2.0",
            "producer": {"name": "tests", "version": "1.0.0", "datetime": "2024-01-01T00:00:00"},
            "windows": {
                "pdb": {"GUID": pe.guid_text, "age": pe.age, "database": pe.pdb, "machine_type": 0x8664},
                "pe": {"major": major, "minor": minor, "revision": revision, "build": build},
            },
        },
        "base_types": {
            name: {"endian": "little", "kind": kind, "signed": signed, "size": size}
            for name, (size, signed, kind) in _BASE.items()
        },
        "user_types": types,
        "enums": {
            "_NT_PRODUCT_TYPE": {
                "base": "unsigned long",
                "size": 4,
                "constants": {"NtProductWinNt": 1, "NtProductLanManNt": 2, "NtProductServer": 3},
            }
        },
        "symbols": {name: {"address": rva} for name, rva in symbols.items()},
    }


def write_isf(folder: Path, symbols: dict[str, int], pe: Pe) -> Path:
    """Write the table where Volatility looks for it below a folder that ``-s`` names; returns where."""
    path = folder / "windows" / pe.pdb / f"{pe.guid_text}-{pe.age}.json.xz"
    path.parent.mkdir(parents=True)
    path.write_bytes(lzma.compress(json.dumps(isf(symbols, pe)).encode()))
    return path
