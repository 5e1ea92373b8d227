"""The 256 characters in which byte-level tokenizers write bytes."""

from __future__ import annotations


def unicode_to_bytes() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (`bytes_to_unicode` of GPT-2's encoder.py)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {shifted.get(byte, chr(byte)): byte for byte in range(256)}
