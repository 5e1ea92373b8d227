"""Lines about the data: files left out, repeated text, separators in the text, and normalization."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from training.data.corpus import Corpus
from training.data.find_files import ENTERED, count_kinds
from training.data.row_files import ROWS
from training.data.shards import Manifest
from training.data.sources import FilesReader, Reader
from training.data.text_files import EXTENSIONS
from training.data.token_files import SUFFIXES
from training.data.token_source import TokensReader
from training.data.tokenizer import Tokenizer

N_SHOWN_TOKENS = 16


def describe_left_out(readers: Iterable[Reader]) -> Iterator[str]:
    """Yield a line for each source whose folders and globs have files that are not read, counted by kind."""
    for reader in readers:
        if isinstance(reader, FilesReader | TokensReader) and reader.left_out:
            advice = f"names must end in {EXTENSIONS}; plain .json files must be named or match a glob"
            if isinstance(reader, FilesReader) and reader.config.has_answers:
                advice = f"files with rows end in {', '.join(ROWS)}"
            if isinstance(reader, TokensReader):
                advice = f"token files end in {', '.join(SUFFIXES)} or .idx"
            yield f"{', '.join(reader.patterns)}: left out {count_kinds(reader.left_out.values())}: {advice}"
            if loops := [path for path, kind in reader.left_out.items() if kind == ENTERED]:
                more = f" and {len(loops) - 1:,} more" if len(loops) > 1 else ""
                yield f"{loops[0]}{more}: leads to a folder that is searched already; its files are read once"


def describe_repeated_files(repeated: Sequence[tuple[Path, Path]]) -> Iterator[str]:
    """Yield a line if several paths lead to one file, as (left out, read)."""
    if repeated:
        path, kept = repeated[0]
        advice = "to repeat text, list it in several sources and give each a weight"
        yield f"paths to files that are listed before, left out: {len(repeated):,} (such as {path}, {kept}); {advice}"


def describe_separators(
    n_borders: int, as_text: Mapping[str, int], tokenizer: Tokenizer, split_on: Sequence[str | None] = (None,)
) -> Iterator[str]:
    """Yield lines about borders between documents, and about names of end-of-text tokens that are none.

    `split_on`: the borders that sources name, and None for .txt files of a source that names none.
    """
    own = " and ".join(tokenizer.separators)
    chosen = [repr(each) for each in split_on if each is not None]
    if chosen and not n_borders:
        yield f"{' and '.join(chosen)} (split_on): nowhere in the text, which is not split"
    if n_borders:
        names = [*([f"{' and '.join(chosen)} (split_on)"] if chosen else []), f"{own} in .txt files"]
        names = names if None in split_on else names[:1]
        yield f"{', '.join(names)}: {n_borders:,}, each a border between documents"
    for name, n in as_text.items():
        is_own = name in tokenizer.separators
        where = ".txt files only" if not any(split_on) else ".txt files of sources without split_on only"
        reason = f"it separates documents in {where}, or where split_on names it"
        reason = reason if is_own else f"documents are separated by {own}; or name it as split_on"
        yield f"{name} in the text: {n:,}, as ordinary characters; {reason}"


def describe_blank(n: int, has_answers: bool = False) -> Iterator[str]:
    """Yield a line if there are documents without text, or rows without an answer."""
    if n:
        yield f"empty documents{' and rows without an answer' if has_answers else ''}, left out: {n:,}"


def describe_unwritten(counts: Mapping[str, int]) -> Iterator[str]:
    """Yield a line if a chat template leaves parts of dialogues out."""
    if counts:
        parts = ", ".join(f"{n:,} {kind}" for kind, n in counts.items())
        yield f"the chat template does not write: {parts}; use a data.chat_template that does, or leave them out"


def describe_dataset(folder: Path, manifest: Manifest, tokenizer: Tokenizer, corpus: Corpus) -> Iterator[str]:
    """Yield lines about the prepared dataset in `folder`, which was built from `corpus`."""
    val, val_names = manifest.of_split("val"), corpus.names("val")
    n_val, parts = sum(record.n_documents for record in val), [part for record in val for part in record.parts]
    if "n_shared" not in manifest.model_fields_set:
        old = "prepared by an earlier version, which did not count separators in the text, nor text that is there twice"
        yield f"{old}; to count them, remove {folder}"
    if not parts and len(val_names) > 1:
        old = "prepared by an earlier version, which did not note the source of each validation document"
        yield f"{old}; for a validation loss of each source, remove {folder}"
    elif parts and (missing := set(range(len(val_names))) - {part.source for part in parts}):
        names = ", ".join(val_names[source] for source in sorted(missing))
        advice = "it is empty" if corpus.val_readers else "a larger data.val_fraction holds some out"
        yield f"no validation text, and so no validation loss of its own: {names}; {advice}"
    for source, split in manifest.val_splits:
        yield f"{val_names[source]}: its split {split!r} is the validation text; no document is held out (val_split)"
    if corpus.may_have_validation and "val_splits" not in manifest.model_fields_set:
        old = "prepared by an earlier version, which held documents out and used no validation split of a data set"
        yield f"{old}; to use one, remove {folder}"
    yield from describe_blank(manifest.n_blank, corpus.config.has_answers)
    yield from describe_unwritten(manifest.unwritten)
    if n := manifest.n_not_utf8:
        yield f"files that are not UTF-8, left out (encoding: skip): {n:,}"
    yield from describe_separators(manifest.n_borders, manifest.as_text, tokenizer, corpus.split_on)
    if n := manifest.n_shared:
        train_names = corpus.names("train")
        pairs = ", ".join(f"{each:,} of {val_names[i]} in {train_names[j]}" for i, j, each in manifest.shared)
        of = f"{n_val:,}{pairs and f' ({pairs})'}"
        advice = "their loss is not that of unseen text; take them out of data.sources or data.val_sources"
        yield f"validation documents that are also training documents: {n:,} of {of}; {advice}"
    if n := manifest.n_repeated:
        yield f"training documents that repeat another word for word: {n:,}"
    before = sum(record.n_bytes for record in manifest.streams)
    after = sum(record.n_bytes if record.token_bytes is None else record.token_bytes for record in manifest.streams)
    if after != before:
        change = f"the tokenizer's {tokenizer.normalization} makes {after:,} bytes of the text's {before:,}"
        yield f"{change}; bits per byte count the text's own"


def describe_tokens(manifest: Manifest, tokenizer: Tokenizer, corpus: Corpus) -> Iterator[str]:
    """Yield lines about sources of token files: what they begin with, and documents that no token separates."""
    for reader in corpus.train_readers + corpus.val_readers:
        if isinstance(reader, TokensReader):
            _, ids = next(reader.blocks(0, min(reader.n_tokens, N_SHOWN_TOKENS)))
            files = "1 file" if len(reader.files) == 1 else f"{len(reader.files):,} files"
            text = json.dumps(tokenizer.decode(ids), ensure_ascii=False)
            yield f"{reader.name}: {reader.n_tokens:,} tokens in {files}, read where they lie; they begin with {text}"
    trained = {sha256 for record in manifest.of_split("train") for sha256 in record.files}
    repeated = [sha256 for record in manifest.of_split("val") for sha256 in record.files if sha256 in trained]
    if repeated and corpus.val_readers:
        advice = "their loss is not that of unseen text; take them out of data.sources or data.val_sources"
        yield f"validation files of tokens that are also training files: {len(repeated):,}; {advice}"
    for record in manifest.streams:
        if record.files and not record.is_separated:
            name = corpus.names(record.split)[record.parts[0].source]
            token = f"no end-of-text token ({tokenizer.end_of_text}, {tokenizer.separator})"
            effect = "one document" if record.n_documents == 1 else "model.isolate_documents cannot tell them apart"
            yield f"{name}: {token} in the {record.n_tokens:,} tokens of {record.split}: {effect}"
