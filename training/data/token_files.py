"""Files of tokens that other trainers wrote: find them, check their headers, and read their tokens in blocks.

| file | layout | documents |
|---|---|---|
| `.bin` of nanoGPT | tokens and nothing else | end-of-text token after each |
| `.bin` of llm.c and modded-nanogpt | 256 int32 (magic number, version, number of tokens), then tokens | before each |
| `.npy` | NumPy's header, then an array of one dimension | either |
| `.bin` with `.idx` of Megatron-LM | tokens; the index has their type, and where documents start | often after each |
"""

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, get_args

import numpy as np
from numpy.lib import format as npy

from training.config import TokenDtype
from training.data.find_files import LeftOut, expand_glob, walk
from training.data.text_files import format_of
from training.errors import UserError
from training.files import open_file

SUFFIXES = (".bin", ".npy")
BLOCK_TOKENS = 2**18  # read at a time: few enough for a processor's caches
HEADER_BYTES = 256 * 4
LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic number: version and type (llm.c, dev/data/data_common.py)
LLM_C_EVAL = 20240522  # of llm.c's multiple-choice items
MEGATRON_MAGIC = b"MMIDIDX\0\0"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the type, sequences, entries of the documents
MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
DTYPES = {np.dtype(name).newbyteorder("<"): name for name in get_args(TokenDtype)}
OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x1f\x8b\x08\0": "packed by gzip",
    b"\x1f\x8b\x08\x08": "packed by gzip",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"\x93NUMPY": "a .npy file by another name",
    MEGATRON_MAGIC: "Megatron-LM's index, which ends in .idx",
}
TEXT_BYTES = np.array([*b"\t\n\r", *range(32, 127)], np.uint8)
PROBE_BYTES = 2**12  # at a file's head, to recognize what is no raw tokens
MAX_ZEROS = 2**14  # at a file's end; more are the unwritten rest of a file that was created at its full size


@dataclass(frozen=True)
class TokenFile:
    """A file whose header was read. `dtype` and `n_tokens` are those of the tokens, which start at byte `offset`."""

    path: Path
    dtype: np.dtype
    offset: int
    n_tokens: int
    index: Path | None = None  # of Megatron-LM
    is_dtype_known: bool = True  # from a header or an option

    def blocks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the tokens [start, stop) in blocks. Raises UserError if the file ends before."""
        try:
            with open_file(self.path) as file:
                file.seek(self.offset + start * self.dtype.itemsize)
                for first in range(start, stop, BLOCK_TOKENS):
                    block = np.empty(min(BLOCK_TOKENS, stop - first), self.dtype)
                    if file.readinto(block.view(np.uint8).data) < block.nbytes:
                        raise UserError(f"{self.path}: cut short while it was read; start again")
                    yield block
        except OSError as error:
            raise unreadable(self.path, error) from None

    def document_starts(self) -> np.ndarray:
        """Return the token at which each document of Megatron-LM's index starts, int64 (n_documents,); else none.

        Raises UserError if the index contradicts itself or its .bin.
        """
        if self.index is None:
            return np.zeros(0, np.int64)
        try:
            with open_file(self.index) as file:
                *_, n_sequences, n_documents = MEGATRON_HEADER.unpack(file.read(MEGATRON_HEADER.size))
                lengths, pointers, documents = (
                    np.frombuffer(file.read(n * np.dtype(dtype).itemsize), dtype)
                    for n, dtype in ((n_sequences, "<i4"), (n_sequences, "<i8"), (n_documents, "<i8"))
                )
        except (OSError, ValueError, struct.error) as error:
            raise unreadable(self.index, error) from None
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if (lengths < 0).any() or (pointers != starts[:-1] * self.dtype.itemsize).any() or starts[-1] != self.n_tokens:
            raise disagrees(self, "its sequences do not follow one another to the end of it")
        if not n_documents or documents[0] != 0 or documents[-1] != n_sequences or (np.diff(documents) < 0).any():
            raise disagrees(self, "its documents do not cover its sequences")
        first = np.unique(starts[documents[:-1]])
        return first[first < self.n_tokens]  # without empty documents


def unreadable(path: Path, error: Exception) -> UserError:
    """Return the error for a file that the system does not read."""
    return UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")


def disagrees(file: TokenFile, reason: str) -> UserError:
    """Return the error for an index that does not belong to its .bin."""
    return UserError(f"{file.index}: does not belong to {file.path.name}: {reason}; copy both files again")


def find_token_files(patterns: Iterable[str]) -> tuple[list[Path], LeftOut]:
    """Return the token files of paths, folders and globs, each once, and what a search left out.

    An .idx stands for its .bin. Raises UserError for a path, folder or glob without a token file.
    """
    files: dict[Path, None] = {}
    left_out: LeftOut = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            matches = [path]
            if path.suffix.lower() not in (*SUFFIXES, ".idx"):
                raise UserError(f"{path}: no token file: its name does not end in {', '.join(SUFFIXES)} or .idx")
        else:
            matches = sorted(search(path, left_out))
        if not matches:
            problem = "no token file" if path.exists() else "no such file or folder, and as a glob it matches none"
            raise UserError(f"{pattern}: {problem}; token files end in {', '.join(SUFFIXES)} or .idx")
        for match in matches:
            if match.suffix.lower() == ".idx" and not (match := match.with_suffix(".bin")).is_file():
                raise UserError(f"{match.with_suffix('.idx')}: Megatron-LM's index, but {match.name} is not beside it")
            files.setdefault(match)
    return list(first_spellings(files)), {path: kind for path, kind in left_out.items() if path not in files}


def search(path: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yield the token files below a folder, or those that a glob matches, also below folders that it matches."""
    for match in [path] if path.is_dir() else expand_glob(path):
        for file in walk(match, left_out=left_out) if match.is_dir() else [match]:
            if file.suffix.lower() in (*SUFFIXES, ".idx"):
                yield file
            else:
                left_out[file] = f"{format_of(file)} file" if format_of(file) else "file without an extension"


def first_spellings(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the paths without those that lead to the file of an earlier one, as links do."""
    seen = set()
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise unreadable(path, error) from None
        if (inode := (status.st_dev, status.st_ino)) not in seen:
            seen.add(inode)
            yield path


def open_token_file(path: Path, dtype: str | None) -> TokenFile:
    """Read a file's header. `dtype` is that of a .bin without one. Raises UserError if it is not a whole token file."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if path.suffix.lower() == ".npy":
                opened = _open_npy(path, file, size)
            elif path.with_suffix(".idx").exists():
                opened = _open_megatron(path, size)
            else:
                opened = _open_bin(path, file.read(PROBE_BYTES), size, dtype)
            _check_end(opened, file)
    except OSError as error:
        raise unreadable(path, error) from None
    if dtype is not None and DTYPES[opened.dtype] != dtype:
        raise UserError(
            f"{path}: its header says {DTYPES[opened.dtype]}, and the option dtype {dtype}; leave dtype out"
        )
    return opened


def _check_end(file: TokenFile, data: BinaryIO) -> None:
    """Raise UserError for a file without tokens, or whose end was never written."""
    if not file.n_tokens:
        raise UserError(f"{file.path}: no tokens in this file")
    if file.n_tokens > MAX_ZEROS:
        data.seek(-MAX_ZEROS * file.dtype.itemsize, os.SEEK_END)
        if not any(data.read()):
            problem = f"its last {MAX_ZEROS:,} tokens are all 0: the program that wrote it was stopped"
            raise UserError(f"{file.path}: {problem}; write it again")


def _check_size(file: TokenFile, size: int, header: str) -> TokenFile:
    expected = file.offset + file.n_tokens * file.dtype.itemsize
    if size != expected:
        problem = "cut short" if size < expected else "longer than its header says"
        sizes = f"{size:,} bytes, but {header} {file.n_tokens:,} tokens, which take {expected:,}"
        raise UserError(f"{file.path}: {problem}: {sizes}; copy or write it again")
    return file


def _check_dtype(path: Path, dtype: np.dtype) -> np.dtype:
    if dtype not in DTYPES:
        names = ", ".join(DTYPES.values())
        raise UserError(f"{path}: its numbers are {dtype.str} ({dtype.name}), and tokens are little-endian {names}")
    return dtype


def _open_npy(path: Path, file: BinaryIO, size: int) -> TokenFile:
    """Read the header of a .npy: data only, as pickled objects are refused by their type."""
    try:
        version = npy.read_magic(file)
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, _, dtype = read_header(file)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: not a .npy file, or one cut short in its header ({error})") from None
    if len(shape) != 1:
        raise UserError(f"{path}: an array of shape {shape}; tokens have one dimension: save it with .reshape(-1)")
    opened = TokenFile(path, _check_dtype(path, dtype), file.tell(), shape[0])
    return _check_size(opened, size, "its header says")


def _open_megatron(path: Path, size: int) -> TokenFile:
    """Read the header of a Megatron-LM index and its last entries; `document_starts` reads all of it."""
    index = path.with_suffix(".idx")
    try:
        with open_file(index) as file:
            head = file.read(MEGATRON_HEADER.size)
            index_size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise unreadable(index, error) from None
    if not head.startswith(MEGATRON_MAGIC):
        problem = f"its magic number is {head[:9]!r}, not Megatron-LM's {MEGATRON_MAGIC!r}"
        raise UserError(f"{index}: {problem}; move it away from {path.name} if the two do not belong together")
    if len(head) < MEGATRON_HEADER.size:
        raise UserError(f"{index}: cut short in its header; copy or write it again")
    _, version, code, n_sequences, n_documents = MEGATRON_HEADER.unpack(head)
    if version != 1:
        raise UserError(f"{index}: version {version} of Megatron-LM's index; only version 1 is known")
    if code not in MEGATRON_DTYPES:
        raise UserError(f"{index}: {code} is no code of a type in Megatron-LM's index")
    dtype = _check_dtype(index, np.dtype(MEGATRON_DTYPES[code]))
    expected = MEGATRON_HEADER.size + 12 * n_sequences + 8 * n_documents
    if index_size != expected:
        sizes = f"{index_size:,} bytes, but {n_sequences:,} sequences and {n_documents:,} documents take {expected:,}"
        remedy = "one with the modes of a multimodal data set" if index_size == expected + n_sequences else "cut short"
        raise UserError(f"{index}: {remedy}: {sizes}")
    opened = TokenFile(path, dtype, 0, size // dtype.itemsize, index)
    _check_last_sequence(opened, size, n_sequences)
    return opened


def _check_last_sequence(file: TokenFile, size: int, n_sequences: int) -> None:
    """Raise UserError if the last sequence of an index does not end where its .bin does."""
    end = 0
    if n_sequences:
        with open_file(file.index) as index:
            index.seek(MEGATRON_HEADER.size + 4 * (n_sequences - 1))
            (length,) = struct.unpack("<i", index.read(4))
            index.seek(MEGATRON_HEADER.size + 4 * n_sequences + 8 * (n_sequences - 1))
            (pointer,) = struct.unpack("<q", index.read(8))
        end = pointer + length * file.dtype.itemsize
    if end != size:
        raise disagrees(file, f"its sequences take {end:,} bytes, and the .bin has {size:,}")


def _open_bin(path: Path, head: bytes, size: int, dtype: str | None) -> TokenFile:
    """Read the header of llm.c's .bin, or check that a file may be one without a header, as nanoGPT's."""
    magic = int.from_bytes(head[:4], "little")
    if magic in LLM_C:
        return _open_llm_c(path, head, size)
    if magic == LLM_C_EVAL:
        raise UserError(f"{path}: llm.c's multiple-choice items (magic number {magic}), not a text's tokens")
    if len(head) >= HEADER_BYTES and magic and not any(head[32:HEADER_BYTES]):
        known = " or ".join(map(str, LLM_C))
        raise UserError(f"{path}: a header of 256 int32 with the magic number {magic}; token files have {known}")
    for signature, name in OTHER_FORMATS.items():
        if head.startswith(signature) and dtype is None:
            raise UserError(f"{path}: {name}, not a file of tokens")
    if head and np.isin(np.frombuffer(head, np.uint8), TEXT_BYTES).all():
        raise UserError(f"{path}: text, not tokens; name it .txt and read it with type: files")
    if dtype is None and path.stem.endswith("_document"):
        remedy = "copy it there, or set dtype to read the .bin without it"
        raise UserError(f"{path}: named as Megatron-LM does, but {path.stem}.idx is not beside it; {remedy}")
    opened = TokenFile(path, np.dtype(dtype or "uint16").newbyteorder("<"), 0, 0, is_dtype_known=dtype is not None)
    n_tokens, rest = divmod(size, opened.dtype.itemsize)
    if rest:
        problem = f"{size:,} bytes are no multiple of the {opened.dtype.itemsize} of a token in {opened.dtype.name}"
        raise UserError(f"{path}: {problem}: cut short, or of another dtype")
    odd = np.frombuffer(head[: len(head) // 4 * 4], "<u2")[1::2]
    if dtype is None and len(odd) and any(head) and not odd.any():
        problem = "every second integer of 16 bits is 0, so its tokens seem to be longer"
        raise UserError(f"{path}: {problem}; set dtype: uint32 or int64, or uint16 if they are not")
    return TokenFile(path, opened.dtype, 0, n_tokens, is_dtype_known=opened.is_dtype_known)


def _open_llm_c(path: Path, head: bytes, size: int) -> TokenFile:
    magic = int.from_bytes(head[:4], "little")
    if len(head) < HEADER_BYTES:
        raise UserError(f"{path}: cut short in its header of {HEADER_BYTES} bytes; copy or write it again")
    version, n_tokens = struct.unpack_from("<4x2i", head)
    known, dtype = LLM_C[magic]
    if version != known:
        raise UserError(f"{path}: version {version} of a token file with magic number {magic}; only {known} is known")
    if n_tokens < 0:
        raise UserError(f"{path}: its header says {n_tokens} tokens; write it again")
    return _check_size(TokenFile(path, np.dtype(dtype), HEADER_BYTES, n_tokens), size, "its header says")
