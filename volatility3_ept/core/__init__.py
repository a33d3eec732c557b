"""Algorithms over a :class:`~volatility3_ept.core.memory.HostMemory`. numpy allowed; Volatility is not known here."""
