"""The 256 printable characters that stand for bytes in byte-level tokenizers."""


def unicode_to_bytes() -> dict[str, int]:
    """Return the byte that each character stands for (the inverse of `bytes_to_unicode` in GPT-2's encoder.py)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {shifted.get(byte, chr(byte)): byte for byte in range(256)}
