"""Volatility contexts for tests: a host's memory as a layer, and guests above it."""

from __future__ import annotations

from pathlib import Path

from builders.paging import HostRam
from volatility3.framework import contexts
from volatility3.framework.layers import lime, physical

from volatility3_ept.layers.guest import GuestPhysicalLayer, HostWithoutGuestsLayer


def file_context(path: Path) -> contexts.Context:
    """Return a context with a raw file as layer ``base``."""
    context = contexts.Context()
    context.config["base.location"] = path.as_uri()
    context.add_layer(physical.FileLayer(context, "base", "base"))
    return context


def buffer_context(data: bytes) -> contexts.Context:
    """Return a context with bytes in memory as layer ``base``: nothing that could be memory-mapped."""
    context = contexts.Context()
    context.add_layer(physical.BufferDataLayer(context, "base", "base", data))
    return context


def lime_context(ram: HostRam, path: Path) -> contexts.Context:
    """Return a context with a LiME file as layer ``base`` (over ``file``): memory with holes, at odd offsets."""
    path.write_bytes(ram.lime())
    context = contexts.Context()
    context.config["file.location"] = path.as_uri()
    context.add_layer(physical.FileLayer(context, "file", "file"))
    context.config["base.base_layer"] = "file"
    context.add_layer(lime.LimeLayer(context, "base", "base"))
    return context


def guest_layer(context: contexts.Context, root: str, base: str = "base", name: str = "guest") -> GuestPhysicalLayer:
    """Stack a guest's physical layer on ``base``."""
    context.config[f"{name}.base_layer"] = base
    context.config[f"{name}.root"] = root
    layer = GuestPhysicalLayer(context, name, name)
    context.add_layer(layer)
    return layer


def masked_layer(context: contexts.Context, roots: list[str], base: str = "base") -> HostWithoutGuestsLayer:
    """Stack the host without its guests on ``base``."""
    context.config["masked.base_layer"] = base
    context.config["masked.roots"] = roots
    layer = HostWithoutGuestsLayer(context, "masked", "masked")
    context.add_layer(layer)
    return layer
