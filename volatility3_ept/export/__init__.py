"""Writes a machine's memory as an image of its own: raw, LiME, ELF core, and a manifest. Nothing of Volatility."""
