"""Every option of a run: its type, default, unit, limits and help text.

Options are added here and nowhere else. This file imports no torch, so `--help` and config errors print at once.
Sections are frozen and strictly checked. A component receives its own config, never the root, and so works in a
notebook or a test without a run.

`type:` selects a variant of a union (mixer, feed-forward, optimizer, schedule, source, tokenizer). A dict beside the
implementations maps each variant to its code.
"""

import codecs
import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt

from training.remote import check_scheme, is_url
from training.section import Alternatives, Count, ListOf, PathText, Section, SectionWithAlternatives, one_of, option

# --- model -----------------------------------------------------------------------------------------

Activation = Literal["gelu_tanh", "gelu", "relu2", "silu"]


class MixerConfig(Section):
    """Options of every kind of attention."""

    head_dim: int | None = option(None, "width of a head; null: n_embd / n_head", unit="channels", ge=1)
    window: int | None = option(
        None, "sliding-window length, including the token itself; null: full causal attention", unit="tokens", ge=1
    )

    def with_explicit_sizes(self, model: "ModelConfig") -> Self:
        """Return a copy in which no null stands for a size."""
        return self.model_copy(update={"head_dim": self.head_dim or model.n_embd // model.n_head})

    def model_rules(self, model: "ModelConfig") -> Iterator[tuple[str, str]]:  # noqa: ARG002 (one signature)
        """Yield (option of this mixer, problem) for each option that does not fit the model."""
        yield from ()


class AttentionConfig(MixerConfig):
    """Causal self-attention: multi-head, grouped-query (arXiv:2305.13245) or multi-query (arXiv:1911.02150)."""

    type: Literal["attention"] = "attention"
    n_kv_head: int | None = option(
        None, "heads of keys and values; n_head / n_kv_head queries share each; null: n_head", unit="heads", ge=1
    )
    softcap: float | None = option(None, "bound scores by softcap x tanh(score / softcap); null: no bound", gt=0)
    qk_norm: bool = option(False, "apply RMSNorm to the queries and keys of each head")
    rope: bool = option(True, "apply RoPE to queries and keys, if model.position is rope")

    def with_explicit_sizes(self, model: "ModelConfig") -> Self:
        changes = {"n_kv_head": self.n_kv_head or model.n_head}
        return super().with_explicit_sizes(model).model_copy(update=changes)

    def model_rules(self, model: "ModelConfig") -> Iterator[tuple[str, str]]:
        width = self.head_dim or model.n_embd // model.n_head
        if self.rope and model.position == "rope" and width % 2:
            yield "head_dim", f"rope needs an even head width, not {width}"
        if self.n_kv_head is not None and model.n_head % self.n_kv_head:
            yield "n_kv_head", f"{self.n_kv_head} does not divide n_head {model.n_head}"


class DifferentialConfig(AttentionConfig):
    """Differential attention (arXiv:2410.05258): each head is the difference of two softmaxes of half its width."""

    type: Literal["differential"] = "differential"
    lambda_init: float = option(0.8, "initial weight of the second softmax, which is subtracted", ge=0, lt=1)

    def model_rules(self, model: "ModelConfig") -> Iterator[tuple[str, str]]:
        width = self.head_dim or model.n_embd // model.n_head
        multiple = 4 if self.rope and model.position == "rope" else 2
        if width % multiple:
            yield "head_dim", f"two halves{' and rope' * (multiple == 4)} need a multiple of {multiple}, not {width}"
        else:
            yield from super().model_rules(model)


class GatedConfig(AttentionConfig):
    """Gated attention (arXiv:2505.06708): `attention` with a sigmoid gate on its output, computed from its input."""

    type: Literal["gated"] = "gated"


class LatentConfig(MixerConfig):
    """Multi-head latent attention (MLA, arXiv:2405.04434): keys and values are projections of one short vector."""

    type: Literal["latent"] = "latent"
    kv_rank: int = option(512, "rank of key and value projections; width of the cached vector", unit="channels", ge=1)
    q_rank: int | None = option(None, "rank of the query projection; null: full rank", unit="channels", ge=1)
    rope_dim: int = option(64, "width added to each head, with RoPE; one key for all heads", unit="channels", ge=2)
    value_dim: int | None = option(None, "width of a head's values; null: head_dim", unit="channels", ge=1)

    def with_explicit_sizes(self, model: "ModelConfig") -> Self:
        explicit = super().with_explicit_sizes(model)
        return explicit.model_copy(update={"value_dim": self.value_dim or explicit.head_dim})

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.rope_dim % 2:
            yield "rope_dim", f"RoPE needs an even width, not {self.rope_dim}"


class MLPConfig(Section):
    """Dense feed-forward layer."""

    type: Literal["mlp"] = "mlp"
    hidden: int | None = option(None, "hidden width; null: 4 x n_embd", unit="channels", ge=1)
    activation: Activation = option("gelu_tanh", "activation (gelu_tanh is GPT-2's gelu_new)")
    gated: bool = option(False, "multiply by a second up-projection (with silu: SwiGLU)")


class MoEConfig(Section):
    """Mixture of experts: each token is routed to top_k experts. docs/moe.md helps to choose."""

    type: Literal["moe"] = "moe"
    n_experts: int = option(8, "experts that the router chooses from", unit="experts", ge=1)
    top_k: int = option(2, "experts per token", unit="experts", ge=1)
    n_shared: int = option(0, "shared experts: every token uses all of them (arXiv:2401.06066)", unit="experts", ge=0)
    hidden: int | None = option(None, "hidden width of one expert; null: 4 x n_embd", unit="channels", ge=1)
    activation: Activation = option("gelu_tanh", "activation of the experts")
    gated: bool = option(False, "multiply by a second up-projection (with silu: SwiGLU)")
    scoring: Literal["softmax", "sigmoid"] = option(
        "softmax", "router scores: softmax over all experts, or sigmoid of each (arXiv:2412.19437)"
    )
    renormalize: bool | None = option(
        None, "scale the weights of a token's experts to sum to one; null: if top_k is above 1"
    )
    route_scale: float = option(1.0, "factor on the weights of a token's experts, applied after renormalize", gt=0)
    jitter: float = option(
        0.0, "in training, multiply the router's inputs by noise in 1 +- jitter (arXiv:2101.03961); 0: none", ge=0, lt=1
    )
    balance: Literal["bias", "switch", "both", "none"] = option(
        "bias", "load balancing: selection bias (arXiv:2408.15664), Switch loss (arXiv:2101.03961), both or none"
    )
    bias_rate: float = option(1e-3, "change of an expert's selection bias per step", gt=0)
    switch_weight: float = option(0.01, "weight of the Switch loss, if balance is switch or both", gt=0)
    z_loss_weight: float = option(1e-3, "weight of the router z-loss (arXiv:2202.08906 eq. 5); 0: none", ge=0)
    capacity_factor: float | None = option(
        None, "expert capacity in training = this x micro-batch tokens x top_k / n_experts; null: drop no tokens", gt=0
    )

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.top_k > self.n_experts:
            yield "top_k", f"{self.top_k} is more than n_experts {self.n_experts}"

    @property
    def is_renormalized(self) -> bool:
        """True if the weights of a token's experts sum to one. A single weight would be 1, and its router not learn."""
        return self.top_k > 1 if self.renormalize is None else self.renormalize


Mixer = one_of(AttentionConfig, LatentConfig, DifferentialConfig, GatedConfig)
FeedForward = one_of(MLPConfig, MoEConfig)


class BlockConfig(Section):
    """One transformer block: a token mixer, then a feed-forward layer."""

    repeat: int = option(1, "consecutive layers that this entry of the pattern stands for", unit="layers", ge=1)
    mixer: Mixer = option(AttentionConfig(), "layer that mixes tokens")
    ffn: FeedForward = option(MLPConfig(), "feed-forward layer, applied to each token separately")
    short_conv: int | None = option(
        None,
        "add to the input of both layers, channel by channel, a weighted sum of the last N tokens; null: nothing",
        unit="tokens",
        ge=2,
        le=64,
    )


class ModelConfig(Section):
    """The network. Sizes have the names of Transformers' `GPT2Config`; the defaults are GPT-2 124M."""

    n_layer: int = option(12, "blocks", unit="layers", ge=1, le=10_000)
    n_head: int = option(12, "attention heads", unit="heads", ge=1)
    n_embd: int = option(768, "width of the residual stream", unit="channels", ge=1)
    n_positions: int = option(1024, "context length: tokens per training sample", unit="tokens", ge=1, le=2**32)
    vocab_size: int | None = option(
        None,
        "rows of the embedding, those beyond the tokenizer's size being padding; null: that size, rounded up to a "
        "multiple of 64",
        unit="tokens",
        ge=2,
    )
    bigram_rows: int | None = option(
        None,
        "rows of a table of embeddings of pairs: a token and the one before it; a hash chooses the row; null: none",
        unit="rows",
        ge=1,
        le=2**32,
    )
    position: Literal["learned", "rope", "none"] = option("learned", "learned (GPT-2) or rotary embedding, or none")
    rope_theta: float = option(10000.0, "base of the rotary frequencies, if position is rope", gt=0)
    norm: Literal["layernorm", "rmsnorm"] = option("layernorm", "normalization before each sub-layer and the head")
    norm_eps: float = option(1e-5, "epsilon of the normalization", gt=0)
    bias: bool = option(True, "biases in linear layers and LayerNorm")
    tie_head: bool = option(True, "use the token embedding as the output projection")
    logit_softcap: float | None = option(None, "bound logits by softcap x tanh(logit / softcap); null: no bound", gt=0)
    dropout: float = option(
        0.0,
        "in training, zero this share of the embeddings and of each sub-layer's output, and scale the rest up",
        ge=0,
        lt=1,
    )
    isolate_documents: bool | None = option(
        None,
        "documents in one sample do not attend to each other; positions restart; null: if sources have answers",
    )
    blocks: ListOf[BlockConfig] = option((BlockConfig(),), "blocks, repeated up to n_layer layers", min_length=1)

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.n_embd % self.n_head and any(block.mixer.head_dim is None for block in self.blocks):
            yield "n_head", f"{self.n_head} heads do not divide n_embd {self.n_embd}"
        for i, block in enumerate(self.blocks):
            for name, problem in block.mixer.model_rules(self):
                yield f"blocks.{i}.mixer.{name}", problem
        period = sum(block.repeat for block in self.blocks)
        if period > self.n_layer:
            yield "blocks", f"the pattern is {period} layers long, more than n_layer {self.n_layer}"

    def with_explicit_sizes(self) -> Self:
        """Return a copy in which no null stands for another value of a block."""

        def explicit(block: BlockConfig) -> BlockConfig:
            ffn = block.ffn
            if "hidden" in type(ffn).model_fields:
                ffn = ffn.model_copy(update={"hidden": ffn.hidden or 4 * self.n_embd})
            if isinstance(ffn, MoEConfig):
                ffn = ffn.model_copy(update={"renormalize": ffn.is_renormalized})
            return block.model_copy(update={"mixer": block.mixer.with_explicit_sizes(self), "ffn": ffn})

        return self.model_copy(update={"blocks": tuple(map(explicit, self.blocks))})

    def layers(self) -> list[BlockConfig]:
        """Return the block of every layer: the pattern repeated up to `n_layer` entries."""
        pattern = [block for block in self.blocks for _ in range(block.repeat)]
        return [pattern[i % len(pattern)] for i in range(self.n_layer)]


# --- data ------------------------------------------------------------------------------------------

AVERAGE = "average"  # in `eval.best` and in the state of the optimizer: the averaged weights
NAME_DOC = "name of its validation text in the logs; null: from its path"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
WEIGHT_DOC = "relative share of samples from this source; null (then in every source): in proportion to size"


# Python's names of codecs between text and bytes. Its other codecs, such as zip and rot13, are transforms.
ENCODINGS = """
    ascii big5 big5hkscs cp037 cp273 cp424 cp437 cp500 cp720 cp737 cp775 cp850 cp852 cp855 cp856 cp857 cp858 cp860 cp861
    cp862 cp863 cp864 cp865 cp866 cp869 cp874 cp875 cp932 cp949 cp950 cp1006 cp1026 cp1125 cp1140 cp1250 cp1251 cp1252
    cp1253 cp1254 cp1255 cp1256 cp1257 cp1258 euc_jp euc_jis_2004 euc_jisx0213 euc_kr gb2312 gbk gb18030 hz iso2022_jp
    iso2022_jp_1 iso2022_jp_2 iso2022_jp_2004 iso2022_jp_3 iso2022_jp_ext iso2022_kr iso8859-1 iso8859-2 iso8859-3
    iso8859-4 iso8859-5 iso8859-6 iso8859-7 iso8859-8 iso8859-9 iso8859-10 iso8859-11 iso8859-13 iso8859-14 iso8859-15
    iso8859-16 johab koi8-r koi8-t koi8-u kz1048 mac-cyrillic mac-greek mac-iceland mac-latin2 mac-roman mac-turkish
    ptcp154 shift_jis shift_jis_2004 shift_jisx0213 utf-32 utf-32-be utf-32-le utf-16 utf-16-be utf-16-le utf-7 utf-8
"""
SKIP_ENCODING = "skip"


def canonical_encoding(name: str) -> str:
    """Return Python's own name of a text encoding, or "skip". Raises ValueError for any other name."""
    if name == SKIP_ENCODING:
        return name
    try:
        canonical = codecs.lookup(name).name
    except (LookupError, ValueError, UnicodeError):
        canonical = ""
    if canonical not in ENCODINGS.split():
        raise ValueError(f"{name!r} is no text encoding that Python knows; try utf-16, cp1252 or latin-1, or skip")
    return canonical


class LimitConfig(SectionWithAlternatives):
    """The first part of a source: whole documents, up to the one that reaches the limit."""

    alternatives = (Alternatives(("bytes", "documents", "tokens")),)
    bytes: Count | None = option(None, "bytes of text, in UTF-8", unit="bytes", ge=1)
    documents: Count | None = option(None, "documents that are not empty", unit="documents", ge=1)
    tokens: Count | None = option(None, "tokens, with the end-of-text token of each document", unit="tokens", ge=1)


LIMIT_DOC = "read only the first part: {bytes: N}, {documents: N} or {tokens: N}, exactly one; null: all"


class StdlibSource(Section):
    """The source code of Python's standard library without its tests, about 11 MB; needs no download."""

    type: Literal["stdlib"] = "stdlib"
    name: str | None = option(None, "name of its validation text in the logs; null: stdlib", pattern=NAME_PATTERN)
    limit: LimitConfig | None = option(None, LIMIT_DOC)
    weight: float | None = option(None, WEIGHT_DOC, gt=0)


class RowsConfig(Section):
    """Options of every source with rows: the columns to read."""

    text_column: str = option("text", "column of rows that holds the text")
    prompt_column: str | None = option(
        None, "column of prompts, with completion_column: a model learns the completions only", min_length=1
    )
    completion_column: str | None = option(None, "column of what follows each prompt", min_length=1)
    messages_column: str | None = option(
        None,
        "column of dialogues, each a list of {role, content}: a model learns the assistant's turns only",
        min_length=1,
    )

    def rules(self) -> Iterator[tuple[str, str]]:
        if (self.prompt_column is None) != (self.completion_column is None):
            yield "prompt_column", "prompt_column and completion_column go together"
        if self.prompt_column is not None and self.messages_column is not None:
            yield "messages_column", "set either messages_column, or prompt_column and completion_column"
        if self.has_answers and self.text_column != "text":
            yield "text_column", "has no effect beside prompt_column or messages_column"

    @property
    def has_answers(self) -> bool:
        """True if the model learns only parts of each row: completions, or the assistant's turns."""
        return self.prompt_column is not None or self.messages_column is not None


class FilesSource(RowsConfig):
    """Files: .txt .md .py (a document each), .jsonl .ndjson .json .csv .tsv .parquet (one a row), also packed."""

    type: Literal["files"] = "files"
    name: str | None = option(None, NAME_DOC, pattern=NAME_PATTERN)
    paths: ListOf[PathText] = option(
        ...,
        "files, folders (with all files below them) or globs, on a disk or at s3://, gs://, az://, hf:// or https://; "
        "in a .txt, <|endoftext|> starts another document",
        min_length=1,
    )
    encoding: str = option(
        "utf-8", "encoding of the text, such as cp1252 or utf-16; skip: leave out files that are not UTF-8"
    )
    split_on: str | None = option(
        None,
        "text between the documents of a .txt, .md or .py file; null: in a .txt <|endoftext|>, elsewhere nothing",
        min_length=1,
    )
    limit: LimitConfig | None = option(None, LIMIT_DOC)
    weight: float | None = option(None, WEIGHT_DOC, gt=0)

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from super().rules()
        if self.has_answers and self.split_on is not None:
            yield "split_on", "has no effect on rows with answers"
        for problem in filter(None, map(check_scheme, self.paths)):
            yield "paths", problem
        try:
            canonical_encoding(self.encoding)
        except ValueError as error:
            yield "encoding", str(error)


AUTO_SPLIT = "auto"


class HuggingFaceSource(RowsConfig):
    """A Hugging Face data set, from the hub or from a local folder."""

    type: Literal["huggingface"] = "huggingface"
    name: PathText = option(..., "name on the hub, or a folder written by `save_to_disk`", min_length=1)
    config: str | None = option(None, "configuration (subset) of the data set; null: its default")
    split: str = option("train", "split of the data set to read")
    data_files: ListOf[str] = option((), "files of the folder or of the hub's data set, or globs; empty: all of them")
    val_split: str | None = option(
        AUTO_SPLIT,
        "split that is the validation text, if there are no val_sources; auto: `validation`, if there is one; null: "
        "documents are held out instead",
        min_length=1,
    )
    streaming: bool = option(False, "read while downloading, without storing the data set first")
    limit: LimitConfig | None = option(None, LIMIT_DOC)
    weight: float | None = option(None, WEIGHT_DOC, gt=0)

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from super().rules()
        if self.val_split == self.split:
            yield "val_split", f"{self.split!r} is also the split to train on"


TokenDtype = Literal["uint8", "uint16", "int16", "uint32", "int32", "int64"]


class TokensSource(Section):
    """Tokens as they are: .bin of nanoGPT, llm.c and modded-nanogpt, .npy, Megatron-LM's .bin with .idx; not copied."""

    type: Literal["tokens"] = "tokens"
    name: str | None = option(None, NAME_DOC, pattern=NAME_PATTERN)
    paths: ListOf[PathText] = option(
        ...,
        "files, folders or globs of .bin and .npy files; one after another in the order of their names",
        min_length=1,
    )
    dtype: TokenDtype | None = option(
        None, "integers of a .bin without a header, as nanoGPT's; null: as the header says, and uint16 without one"
    )
    end_of_text: int | None = option(
        None, "id of the token between documents; null: data.tokenizer's end-of-text token", unit="id", ge=0, lt=2**24
    )
    weight: float | None = option(None, WEIGHT_DOC, gt=0)

    def rules(self) -> Iterator[tuple[str, str]]:
        if remote := [path for path in self.paths if is_url(path)]:
            yield (
                "paths",
                f"{remote[0]}: token files are mapped where they lie, so they must be on a disk; copy it there",
            )


class BPETokenizer(Section):
    """A byte-level BPE, trained on the training documents."""

    type: Literal["bpe"] = "bpe"
    vocab_size: int = option(8192, "tokens, including the end-of-text token", unit="tokens", ge=257, le=2**24)
    max_bytes: int = option(50_000_000, "maximum training text to learn the merges from", unit="bytes", ge=1)


class ByteTokenizer(Section):
    """One token per byte and an end-of-text token; nothing is trained."""

    type: Literal["byte"] = "byte"


class FileTokenizer(Section):
    """A tokenizer from disk."""

    type: Literal["file"] = "file"
    path: PathText = option(..., "tokenizer.json, or a folder with it or with vocab.json and merges.txt", min_length=1)


class HuggingFaceTokenizer(Section):
    """A tokenizer from the Hugging Face hub."""

    type: Literal["huggingface"] = "huggingface"
    name: str = option(..., "name on the hub, such as openai-community/gpt2", min_length=1)


class TiktokenTokenizer(Section):
    """A tokenizer of tiktoken."""

    type: Literal["tiktoken"] = "tiktoken"
    name: str = option(..., "name of the encoding, such as gpt2 or cl100k_base", min_length=1)


SourceConfig = one_of(FilesSource, StdlibSource, HuggingFaceSource, TokensSource)
TokenizerConfig = one_of(BPETokenizer, ByteTokenizer, FileTokenizer, HuggingFaceTokenizer, TiktokenTokenizer)


def chosen_name(source: SourceConfig) -> str | None:
    """Return the name that an option gives a source; None for a Hugging Face source, whose `name` is the data set's."""
    return None if isinstance(source, HuggingFaceSource) else source.name


def has_answers(source: SourceConfig) -> bool:
    """Return True if the model learns only the answers in a source's rows."""
    return isinstance(source, RowsConfig) and source.has_answers


class DataConfig(Section):
    """Text, tokenizer and held-out split. Text is tokenized once, into memory-mapped shards in `cache_dir`."""

    sources: ListOf[SourceConfig] = option(..., "training text: [{paths: [my.txt]}] or [{type: stdlib}]", min_length=1)
    val_sources: ListOf[SourceConfig] = option((), "validation text; empty: documents held out of `sources`")
    val_fraction: float = option(
        0.02,
        "share of documents to hold out by hash (of a single text file or of tokens: the end); unused with val_sources",
        gt=0,
        lt=1,
    )
    tokenizer: TokenizerConfig = option(BPETokenizer(), "how text becomes tokens")
    chat_template: PathText | None = option(
        None,
        "Jinja file that writes a dialogue as text; null: the template beside the tokenizer's files, else our own",
        min_length=1,
    )
    too_long: Literal["cut", "leave_out"] = option(
        "cut", "rows with answers that are longer than the context: cut their end off, or leave them out"
    )
    cache_dir: PathText = option("data_cache", "folder for token shards, shared by all runs", min_length=1)
    workers: int | None = option(None, "threads that tokenize; null: one per core", unit="threads", ge=1, le=1024)

    @property
    def has_answers(self) -> bool:
        """True if a source has answers, so that samples are packed from whole rows."""
        return any(map(has_answers, (*self.sources, *self.val_sources)))

    @property
    def has_messages(self) -> bool:
        """True if a source has dialogues, which a chat template writes."""
        sources = (*self.sources, *self.val_sources)
        return any(isinstance(source, RowsConfig) and source.messages_column is not None for source in sources)

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.chat_template is not None and not self.has_messages:
            yield "chat_template", "has no effect without a source with messages_column"
        if self.too_long != "cut" and not self.has_answers:
            yield "too_long", "has no effect without a source with prompt_column or messages_column"
        if len(set(map(has_answers, self.sources))) > 1 and any(source.weight is None for source in self.sources):
            yield "sources", "give every source a weight, because some have answers (prompts, dialogues) and some text"
        for name, sources in (("sources", self.sources), ("val_sources", self.val_sources)):
            if len({source.weight is None for source in sources}) > 1:
                yield name, "give every source a weight, or none of them"
            chosen = [name for name in map(chosen_name, sources) if name is not None]
            if AVERAGE in chosen:
                yield (
                    name,
                    f"a source cannot have the name {AVERAGE}, which stands for the averaged weights (eval.best)",
                )
            for repeated in sorted({each for each in chosen if chosen.count(each) > 1}):
                yield name, f"two sources have the name {repeated}"
        tokens = [source for source in (*self.sources, *self.val_sources) if isinstance(source, TokensSource)]
        if tokens and isinstance(self.tokenizer, BPETokenizer):
            example = "{type: tiktoken, name: gpt2}"
            yield "tokenizer", f"bpe learns a new one, and token files need the one that made them, such as {example}"
        ids = sorted({source.end_of_text for source in tokens if source.end_of_text is not None})
        if len(ids) > 1:
            yield "sources", f"token sources name the end_of_text {ids[0]} and {ids[1]}, and a run has one"
        types = {type(source) for source in self.sources if isinstance(source, TokensSource) or has_answers(source)}
        if TokensSource in types and len(types) > 1 and all(source.weight is None for source in self.sources):
            yield "sources", "give every source a weight: token files and rows with answers share no stream"


# --- optimizer and schedule ------------------------------------------------------------------------


class AverageConfig(Section):
    """An exponential average of the weights, in float32, from the end of warm-up on; training does not read it."""

    decay: float = option(0.999, "share of the average that a step keeps", gt=0, lt=1)
    final: bool = option(False, "the final model has the averaged weights")


class ParameterGroup(Section):
    """Parameters with options of their own, chosen by their names: those of the model's state_dict."""

    match: str = option(
        ...,
        "pattern of names, as in blocks.*.ffn.router.*: * is any text, also with dots, ? a character, [01] one of "
        "these; the first group that matches a parameter has it",
        min_length=1,
    )
    learning_rate: float | None = option(
        None, "peak learning rate, with muon of Muon's matrices, too; null: what they have without this group", gt=0
    )
    weight_decay: float | None = option(
        None, "decoupled weight decay, also of biases, norms and embeddings; null: as without this group", ge=0
    )
    freeze: bool = option(False, "keep these weights as they are: no gradient, no optimizer state")

    def rules(self) -> Iterator[tuple[str, str]]:
        values = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        chosen = [name for name, value in values.items() if value is not None]
        if self.freeze and chosen:
            yield chosen[0], "no effect with freeze"


class OptimConfig(Section):
    """Options of every optimizer, which the training loop and the log read."""

    learning_rate: float = option(6e-4, "peak learning rate", gt=0)
    grad_clip: float | None = option(1.0, "largest global gradient norm; null: no clipping", gt=0)
    average: AverageConfig | None = option(None, "also keep and evaluate an average of the weights; null: off")
    groups: ListOf[ParameterGroup] = option((), "parameters with another learning rate or weight decay, or frozen")


class AdamWConfig(OptimConfig):
    """AdamW for all parameters; weight decay on matrices only (not on biases, norms and embeddings)."""

    type: Literal["adamw"] = "adamw"
    embedding_learning_rate: float | None = option(
        None, "peak for embeddings (not bigram_rows), head and short_conv; null: learning_rate", gt=0
    )
    beta1: float = option(0.9, "decay of the gradient's running mean", ge=0, lt=1)
    beta2: float = option(0.95, "decay of the squared gradient's running mean", ge=0, lt=1)
    eps: float = option(1e-8, "added to the denominator", gt=0)
    weight_decay: float = option(0.1, "decoupled weight decay of matrices", ge=0)


class MuonConfig(AdamWConfig):
    """Muon for the matrices of the blocks (each expert is one); AdamW at `learning_rate` for the rest."""

    type: Literal["muon"] = "muon"
    muon_learning_rate: float = option(0.02, "peak learning rate of the matrices", gt=0)
    momentum: float = option(0.95, "Nesterov momentum of the matrices' gradients", ge=0, lt=1)
    ns_steps: int = option(5, "Newton-Schulz iterations", unit="iterations", ge=1, le=100)


class LionConfig(OptimConfig):
    """Lion (arXiv:2302.06675): sign updates, half of AdamW's state; use 1/3 to 1/10 of AdamW's learning rate."""

    type: Literal["lion"] = "lion"
    beta1: float = option(0.9, "weight of the running mean in the update", ge=0, lt=1)
    beta2: float = option(0.99, "decay of the gradient's running mean", ge=0, lt=1)
    weight_decay: float = option(0.1, "decoupled weight decay of matrices", ge=0)


Optim = one_of(AdamWConfig, MuonConfig, LionConfig)


class ScheduleConfig(SectionWithAlternatives):
    """Options of every learning-rate schedule."""

    alternatives = (Alternatives(("warmup_steps", "warmup"), 100),)
    warmup_steps: int | None = option(
        None,
        "linear warm-up from zero; the update after it has the peak; null: `warmup`, or 100 without it",
        unit="steps",
        ge=0,
    )
    warmup: float | None = option(
        None, "instead of warmup_steps: the warm-up as a share of the run, such as 0.02; null: warmup_steps", ge=0
    )

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from super().rules()
        if self.warmup is not None and self.warmup >= 1:
            yield "warmup", f"{self.warmup:g} is not a share of the run, below 1; write warmup_steps: {self.warmup:g}"

    def in_steps(self, steps: int) -> Self:
        """Return a copy for `steps` steps in which no length is a share of the run; shares round to whole steps."""
        if self.warmup is None:
            return self
        return self.model_copy(update={"warmup": None, "warmup_steps": share_of(steps, self.warmup)})

    def fitted(self, steps: int) -> Self:
        """Return a copy with lengths in steps that fits into `steps` steps.

        A warm-up that does not fit takes the first half of them.
        """
        explicit = self.in_steps(steps)
        if explicit.warmup_steps < steps:
            return explicit
        return explicit.model_copy(update={"warmup_steps": (steps - 1) // 2})


def share_of(steps: int, share: float) -> int:
    """Return a share of the steps, rounded; exactly half a step rounds up."""
    return math.floor(Fraction(str(share)) * steps + Fraction(1, 2))


class CosineSchedule(ScheduleConfig):
    """Linear warm-up, then half a cosine period down to final_ratio at the last update."""

    type: Literal["cosine"] = "cosine"
    final_ratio: float = option(0.1, "learning rate of the last update / peak; 0: it changes nothing", ge=0, le=1)


class LinearSchedule(CosineSchedule):
    """Linear warm-up, then linear decay to final_ratio at the last update."""

    type: Literal["linear"] = "linear"


class WSDSchedule(CosineSchedule):
    """Linear warm-up, constant at the peak, then decay to final_ratio over the last `decay_steps`."""

    alternatives = (*ScheduleConfig.alternatives, Alternatives(("decay_steps", "decay")))
    type: Literal["wsd"] = "wsd"
    decay_steps: int | None = option(None, "length of the final decay; null: `decay`", unit="steps", ge=1)
    decay: float | None = option(
        None, "instead of decay_steps: the final decay as a share of the run, such as 0.2; null: decay_steps", gt=0
    )
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = option(
        "linear", "curve of the decay: a line, half a cosine, or 1 - sqrt(share of the decay) (arXiv:2405.18392)"
    )
    final_ratio: float = option(0.0, "learning rate of the last update / peak; 0: it changes nothing", ge=0, le=1)

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from super().rules()
        if self.decay is not None and self.decay > 1:
            yield "decay", f"{self.decay:g} is not a share of the run, at most 1; write decay_steps: {self.decay:g}"
        elif None not in (self.warmup, self.decay) and Fraction(str(self.warmup)) + Fraction(str(self.decay)) > 1:
            yield "decay", f"{self.decay:g} and warmup {self.warmup:g} are more than the run together; lower one"

    def in_steps(self, steps: int) -> Self:
        explicit = super().in_steps(steps)
        if self.decay is None:
            return explicit
        return explicit.model_copy(update={"decay": None, "decay_steps": max(1, share_of(steps, self.decay))})

    def fitted(self, steps: int) -> Self:
        """Return a copy with lengths in steps that fits into `steps` steps: both are shortened alike."""
        explicit = self.in_steps(steps)
        total = explicit.warmup_steps + explicit.decay_steps
        if total <= steps:
            return explicit
        warmup_steps = min(explicit.warmup_steps * steps // total, (steps - 1) // 2)
        decay_steps = min(explicit.decay_steps, steps - warmup_steps)
        return explicit.model_copy(update={"warmup_steps": warmup_steps, "decay_steps": decay_steps})


class ConstantSchedule(ScheduleConfig):
    """Linear warm-up, then constant at the peak."""

    type: Literal["constant"] = "constant"


class InverseSqrtSchedule(ScheduleConfig):
    """Linear warm-up, then decay with 1 / sqrt(step) (arXiv:1706.03762), which does not depend on `steps`."""

    type: Literal["inverse_sqrt"] = "inverse_sqrt"


Schedule = one_of(CosineSchedule, LinearSchedule, WSDSchedule, ConstantSchedule, InverseSqrtSchedule)


# --- execution, checkpoints, evaluation, logging ------------------------------------------------------


class MeshConfig(Section):
    """The device mesh of replicate x shard processes. docs/distributed.md explains the choice."""

    replicate: int | None = option(None, "copies of the model (HSDP); null: processes / shard", unit="copies", ge=1)
    shard: int = option(1, "processes that share weights, gradients and optimizer (FSDP2)", unit="processes", ge=1)
    expert: int = option(1, "processes that share each layer's experts (all-to-all)", unit="processes", ge=1)

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.shard > 1 and self.shard % self.expert:
            yield "expert", f"{self.expert} does not divide shard {self.shard}"
        elif self.replicate is not None and (self.replicate * self.shard) % self.expert:
            yield "expert", f"{self.expert} does not divide replicate x shard = {self.replicate * self.shard}"


class ParallelConfig(Section):
    """Devices, kernels and parallelism. They change speed and memory; results change only by the order of sums."""

    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: the first of these that is available")
    attention: Literal[
        "auto", "flash3", "flash4", "flash2", "cudnn", "flash", "varlen", "flex", "efficient", "sdpa", "reference"
    ] = option("auto", "attention kernel; auto: the first that runs here and equals the reference")
    experts: Literal["auto", "triton", "grouped", "loop", "reference"] = option(
        "auto", "expert kernel; auto: the first that runs here and equals the reference, on CUDA the fastest"
    )
    loss: Literal["auto", "triton", "chunked", "reference"] = option(
        "auto", "loss kernel; auto: the first that runs here; reference holds all logits in memory at once"
    )
    compile: bool = option(False, "compile the blocks with torch.compile; on a CPU it needs a C++ compiler")
    recompute: Literal["none", "selective", "full"] = option(
        "none", "activation checkpointing: recompute whole blocks (full), or all but matmul outputs (selective)"
    )
    mesh: MeshConfig = option(MeshConfig(), "how processes share weights and experts")
    timeout_s: float = option(
        600.0, "wait for another process, before an error names it and ends the run", unit="seconds", gt=0
    )


class CheckpointConfig(Section):
    """Intervals and number of checkpoints. A run is also saved at its end and on SIGTERM, SIGINT and SIGUSR1."""

    every: int | None = option(500, "save every N steps; null: not by steps", unit="steps", ge=1)
    every_minutes: float | None = option(10.0, "save every N minutes; null: not by time", unit="minutes", gt=0)
    keep: int = option(2, "number of newest checkpoints to keep", unit="checkpoints", ge=1)
    keep_best: bool = option(True, "also save and keep the checkpoint with the lowest validation loss (eval.best)")
    keep_every: int | None = option(
        None, "also save every N steps, and keep these checkpoints; null: none", unit="steps", ge=1
    )
    final: Literal["last", "best"] = option("last", "the step whose weights are the final model")
    background: bool = option(True, "write in the background from a copy in memory, while training continues")
    one_file_gib: float = option(
        8.0, "one file each for model and optimizer, up to this size of both", unit="GiB", ge=0
    )

    copy_to: PathText | None = option(
        None,
        "place for a copy of each checkpoint, such as s3://bucket/run or a path on another disk; a start without "
        "checkpoints goes on from there; null: none",
        min_length=1,
    )

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.final == "best" and not self.keep_best:
            yield "final", "the best checkpoint is there only with keep_best"
        if self.copy_to is not None and (problem := check_scheme(self.copy_to, is_written=True)):
            yield "copy_to", problem


class TaskConfig(Section):
    """Options of every task: items whose answers get a log-likelihood, as in EleutherAI's lm-eval."""

    name: str | None = option(None, "name in the logs; null: the type", pattern=NAME_PATTERN)
    paths: ListOf[PathText] = option(
        (), "files with an item a row: .jsonl .ndjson .json .csv .tsv .parquet, also packed"
    )
    dataset: PathText | None = option(None, "instead of paths: a Hugging Face data set, on the hub or in a folder")
    config: str | None = option(None, "configuration (subset) of the data set; null: its default")
    split: str = option("validation", "split of the data set with the items")
    limit: int | None = option(None, "use only the first N items; null: all", unit="items", ge=1)
    shots: int = option(0, "solved examples before each item", unit="items", ge=0)
    examples: ListOf[PathText] = option((), "files whose first rows are the solved examples")
    examples_split: str = option("train", "split of the data set whose first rows are the solved examples")

    def rules(self) -> Iterator[tuple[str, str]]:
        if bool(self.paths) == (self.dataset is not None):
            yield "paths", "set either paths or dataset"
        elif self.shots and self.paths and not self.examples:
            yield "examples", f"{self.shots} shots need the files of the solved examples"
        elif self.examples and not self.shots:
            yield "examples", "no effect without shots"
        elif self.examples and self.dataset is not None:
            yield "examples", "no effect with dataset, whose examples_split has the solved examples"
        for name in ("config", "split", "examples_split"):
            if self.dataset is None and getattr(self, name) != type(self).model_fields[name].default:
                yield name, "no effect without dataset"


class ChoiceConfig(TaskConfig):
    """Options of multiple choice. A template is Jinja; its variables are the row's columns."""

    prompt: str = option(..., "template of the text before an answer")
    choices: ListOf[str] = option(..., "templates of the answers, or one column with a list of them", min_length=1)
    label: str = option(..., "column of the right answer: its number from 0, its letter, or its text")

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from super().rules()
        if len(self.choices) > 1 and not all("{" in template for template in self.choices):
            yield "choices", "several entries are templates such as '{{ a }}'; a column with a list is one entry"


class HellaSwagTask(ChoiceConfig):
    """HellaSwag (arXiv:1905.07830): the likeliest end of a description."""

    type: Literal["hellaswag"] = "hellaswag"
    prompt: str = option("{{ query }}", "template of the text before an answer")
    choices: ListOf[str] = option(("endings",), "column that holds the answers", min_length=1)
    label: str = option("label", "column of the right answer: its number from 0")


class ARCTask(ChoiceConfig):
    """ARC, easy or challenge (arXiv:1803.05457): questions of science."""

    type: Literal["arc"] = "arc"
    prompt: str = option("Question: {{ question }}\nAnswer:", "template of the text before an answer")
    choices: ListOf[str] = option(("choices",), "column that holds the answers", min_length=1)
    label: str = option("answerKey", "column of the right answer: its label")


class PIQATask(ChoiceConfig):
    """PIQA (arXiv:1911.11641): the better way to do something."""

    type: Literal["piqa"] = "piqa"
    prompt: str = option("Question: {{ goal }}\nAnswer:", "template of the text before an answer")
    choices: ListOf[str] = option(("{{ sol1 }}", "{{ sol2 }}"), "templates of the answers", min_length=1)
    label: str = option("label", "column of the right answer: its number from 0")


class MultipleChoiceTask(ChoiceConfig):
    """Multiple choice from columns of any name."""

    type: Literal["multiple_choice"] = "multiple_choice"


class ClozeTask(TaskConfig):
    """The end of a text, right if it is the likeliest continuation. The default is LAMBADA's (arXiv:1606.06031)."""

    type: Literal["cloze"] = "cloze"
    prompt: str = option("{{ text.split(' ')[:-1] | join(' ') }}", "template of the text before the answer")
    answer: str = option("{{ text.split(' ')[-1] }}", "template of the answer")


Task = one_of(HellaSwagTask, ARCTask, PIQATask, ClozeTask, MultipleChoiceTask)
# By type: those that need no options but a path.
SHIPPED_TASKS = {"hellaswag": HellaSwagTask, "arc": ARCTask, "piqa": PIQATask, "cloze": ClozeTask}


class EvalConfig(Section):
    """Evaluation on a fixed part of the validation text, and samples of generated text."""

    every: int | None = option(200, "evaluate every N steps and at the end; null: at the end only", unit="steps", ge=1)
    tokens: int | None = option(1_000_000, "validation tokens to evaluate on; null: all", unit="tokens", ge=1)
    best: str | None = option(
        None,
        "whose validation loss decides which step is best: the name of a source, `average` for the averaged weights; "
        "null: the loss over all sources",
    )
    patience: int | None = option(
        None, "stop after N evaluations without a lower loss (eval.best); null: never", unit="evaluations", ge=1
    )
    tasks: ListOf[Task] = option((), "tasks to score: [{type: hellaswag, paths: [hellaswag_val.jsonl]}]")
    tasks_every: int | None = option(
        None, "score the tasks every N steps and at the end; null: at the end only", unit="steps", ge=1
    )
    prompts: ListOf[str] = option((), "prompts to continue at each evaluation")
    sample_tokens: int = option(64, "length of each continuation", unit="tokens", ge=1)
    temperature: float = option(0.8, "sampling temperature; 0: greedy", ge=0)
    top_k: int | None = option(50, "sample from the N likeliest tokens; null: from all", unit="tokens", ge=1)

    def rules(self) -> Iterator[tuple[str, str]]:
        chosen = [task.name for task in self.tasks if task.name is not None]
        for repeated in sorted({name for name in chosen if chosen.count(name) > 1}):
            yield "tasks", f"two tasks have the name {repeated}"
        if self.patience is not None and self.every is None:
            yield "patience", "needs evaluations: set every"


class WandbConfig(Section):
    """Weights & Biases."""

    project: str | None = option(None, "W&B project; null: WANDB_PROJECT's, else training", min_length=1)
    entity: str | None = option(None, "W&B user or team; null: WANDB_ENTITY's, else your default", min_length=1)
    group: str | None = option(None, "group of runs; null: WANDB_RUN_GROUP's, else none", min_length=1)
    tags: ListOf[Annotated[str, Field(min_length=1, max_length=64)]] = option(
        (), "tags, of 1 to 64 characters; empty: those of WANDB_TAGS"
    )
    notes: str | None = option(None, "notes; null: those of WANDB_NOTES", min_length=1)
    mode: Literal["online", "offline", "disabled"] | None = option(
        None, "send while training, store on disk for `wandb sync`, or neither; null: WANDB_MODE's, else online"
    )


class LoggingConfig(Section):
    """Outputs in addition to metrics.jsonl, which is always written."""

    every: int = option(10, "print a console line and fetch metrics from the device every N steps", unit="steps", ge=1)
    console: Literal["full", "brief"] = option("full", "brief: nothing but a line of progress every 10 seconds")
    tensorboard: bool = option(True, "write TensorBoard events")
    histogram_every: int = option(
        100, "measure norms and update sizes by layer, and draw the expert load, every N steps", unit="steps", ge=1
    )
    trace_at: ListOf[PositiveInt] = option((), "steps at which torch.profiler records a trace of the next 3 steps")
    wandb: WandbConfig | None = option(None, "log to Weights & Biases; null: off")


class BatchStage(Section):
    """The batch of the steps from a number of tokens on, up to the next stage."""

    from_tokens: Count = option(
        ..., "tokens read before the stage; rounds up to whole steps; 0 in the first stage", unit="tokens", ge=0
    )
    batch_tokens: int = option(..., "tokens per optimizer step, over all processes", unit="tokens", ge=1, le=2**32)


HORIZONS = ("steps", "tokens", "epochs", "tokens_per_parameter")


class Config(SectionWithAlternatives):
    """All options of a run."""

    alternatives = (Alternatives(HORIZONS, 1000), Alternatives(("batch_tokens", "batch_schedule"), 524_288))
    name: str = option("gpt2", "name of the run and of its folder in out_dir", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    out_dir: PathText = option("runs", "folder of all runs", min_length=1)
    seed: int = option(0, "random seed of initial weights, data order and generated samples", ge=0, lt=2**32)
    steps: Count | None = option(
        None,
        "length of the run; null: tokens, epochs or tokens_per_parameter, or 1000 without them",
        unit="steps",
        ge=1,
    )
    tokens: Count | None = option(
        None, "instead of steps: tokens to read, such as 1e9; rounds up to whole steps", unit="tokens", ge=1
    )
    epochs: float | None = option(
        None,
        "instead of steps: passes over the training text (with weights, over the source that is read most); rounds up",
        unit="epochs",
        gt=0,
    )
    tokens_per_parameter: float | None = option(
        None, "instead of steps: tokens to read per active parameter, such as 20; rounds up to whole steps", gt=0
    )
    batch_tokens: int | None = option(
        None,
        "tokens per optimizer step, over all processes; null: batch_schedule, or 524288 without it",
        unit="tokens",
        ge=1,
        le=2**32,
    )
    batch_schedule: ListOf[BatchStage] = option(
        (),
        "instead of batch_tokens: [{from_tokens: 0, batch_tokens: 65536}, {from_tokens: 50e6, "
        "batch_tokens: 262144}]; learning rates do not change with them",
    )
    micro_batch: Literal["auto"] | PositiveInt = option(
        "auto", "samples per forward and backward; auto: as many as fit; changes only memory and speed", unit="samples"
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "compute dtype of matmuls; auto: bf16 if the device supports it in hardware, else fp32"
    )
    init_from: PathText | None = option(
        None, "initial weights and sizes: a finished run, a Hugging Face folder or hub name; null: random", min_length=1
    )
    upcycle_noise: float | None = option(
        None, "upcycling: noise added to new experts, relative to the dense layer's weights; null: none", gt=0
    )
    skip_spikes: float | None = option(
        None,
        "skip an update whose loss or gradient norm is N deviations above the mean of the last 128; null: off",
        unit="standard deviations",
        gt=0,
    )
    model: ModelConfig = option(ModelConfig(), "the network")
    data: DataConfig = option(..., "training and validation text")
    optim: Optim = option(AdamWConfig(), "the optimizer")
    schedule: Schedule = option(CosineSchedule(), "learning-rate schedule")
    parallel: ParallelConfig = option(ParallelConfig(), "devices, kernels and parallelism")
    checkpoint: CheckpointConfig = option(CheckpointConfig(), "checkpoints")
    eval: EvalConfig = option(EvalConfig(), "evaluation")
    logging: LoggingConfig = option(LoggingConfig(), "logging")

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.out_dir, self.name)

    @property
    def isolates_documents(self) -> bool:
        """True if documents in one sample do not see each other."""
        isolate = self.model.isolate_documents
        return self.data.has_answers if isolate is None else isolate

    def resolved(self) -> Self:
        """Return a copy in which no null stands for another value of the model, and the schedule fits into `steps`.

        The schedule stays as it is if the steps are not known yet: `planning/horizon.py` resolves them.
        """
        model = self.model.with_explicit_sizes().model_copy(update={"isolate_documents": self.isolates_documents})
        schedule = self.schedule if self.steps is None else self.schedule.fitted(self.steps)
        return self.model_copy(update={"model": model, "schedule": schedule})

    def _batches(self) -> Iterator[tuple[str, int]]:
        """Yield (option, tokens) of each size of a batch."""
        if self.batch_tokens is not None:
            yield "batch_tokens", self.batch_tokens
        for i, stage in enumerate(self.batch_schedule):
            yield f"batch_schedule.{i}.batch_tokens", stage.batch_tokens

    def with_steps(self, steps: int) -> Self:
        """Return a copy of this length."""
        return self.model_copy(update={**dict.fromkeys(HORIZONS), "steps": steps})

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from super().rules()
        is_inherited = self.init_from is not None and "n_positions" not in self.model.model_fields_set
        for name, batch_tokens in self._batches():
            if not is_inherited and batch_tokens % self.model.n_positions:
                yield name, f"{batch_tokens} is not a multiple of model.n_positions {self.model.n_positions}"
        starts = [stage.from_tokens for stage in self.batch_schedule]
        if starts and starts[0]:
            yield "batch_schedule.0.from_tokens", f"{starts[0]} in the first stage; write 0"
        for i, (before, start) in enumerate(pairwise(starts), start=1):
            if start <= before:
                yield (
                    f"batch_schedule.{i}.from_tokens",
                    f"{start} is not after {before}, where the stage before it starts",
                )
        if self.data.has_answers and self.model.isolate_documents is False:
            yield "model.isolate_documents", "sources with answers need true, because a sample holds several rows"
        if self.eval.patience is not None and not self.checkpoint.keep_best:
            yield "eval.patience", "its final model is the best one, which is there only with checkpoint.keep_best"
        if self.checkpoint.copy_to is not None and not is_url(self.checkpoint.copy_to):
            place, run_dir = Path(self.checkpoint.copy_to).resolve(), self.run_dir.resolve()
            if place == run_dir.parent or place.is_relative_to(run_dir):
                what = "is out_dir" if place == run_dir.parent else "is in the folder of this run"
                yield "checkpoint.copy_to", f"{self.checkpoint.copy_to} {what}; name another folder"
        if self.upcycle_noise is not None and self.init_from is None:
            yield "upcycle_noise", "needs init_from, whose dense layers become experts"


# Options that may change on a resume, because none of them changes what the run computes.
CHANGEABLE_ON_RESUME = frozenset(
    {"name", "out_dir", "micro_batch", "parallel", "checkpoint", "eval", "logging", "data.cache_dir", "data.workers"}
)
