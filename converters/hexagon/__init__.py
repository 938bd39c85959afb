"""Hexagon context binaries: compiled from a bundle's graphs, run in the emulator, handed over to phones.

Everything native runs in processes of its own (``jobs``, ``worker``). Needs the extra ``hexagon``; nothing of
Qualcomm's is copied.
"""
