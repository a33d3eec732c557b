"""What the manuals say: constants, bit layouts, the decoding of one value.

Standard library only. Entry predicates are written with operators alone (``&``, ``>>``, ``^``, comparisons), so
one definition serves a Python ``int`` and a numpy ``uint64`` array.
"""
