"""Plant defects in a copy of the package, one at a time, and check that a test catches each.

    python tests/mutants.py [WORD...]      the defects whose name contains a word; exit status 1 if one survives
    python tests/mutants.py --check        only check that every text is in its file and every test exists

`tests/test_mutants.py` does the same check.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Defect(NamedTuple):
    """A replacement of text in a file, and the tests that should fail; their output must match `says`."""

    name: str
    file: str
    text: str
    planted: str
    tests: str
    says: str = ""


RANKS = "tests/test_distributed.py -k ranks_and_layouts"
MOVES = "tests/test_distributed.py -k move_between"
SAVES = "tests/test_checkpoint.py tests/test_background_save.py"
DEFECTS = [
    # computation
    Defect("loss divided by the local count", "engine/step.py", "n_targets=world.sum_int(batch.n_local_targets)",
           "n_targets=batch.n_local_targets * world.size", RANKS),
    Defect("an empty micro-batch counts", "engine/micro_batch.py", "(0.0 if is_empty else loss_scale)",
           "loss_scale", RANKS),
    Defect("an empty micro-batch's metrics count", "engine/micro_batch.py",
           "for name, value in metrics.items()} if is_empty else metrics",
           "for name, value in metrics.items()} if False else metrics", RANKS),
    Defect("evaluation counts samples twice", "engine/evaluate.py", "if len(chunk) == 0:", "if False:", RANKS),
    Defect("bias updated by micro-batch", "model/moe.py", "(count_LE.mean(dim=1, keepdim=True) - count_LE).sign()",
           "(count_LE[:, :1] - count_LE).sign()", "tests/test_loop.py -k balances"),
    Defect("layers' counts are swapped", "model/gpt.py", "for i in layers]\n", "for i in layers[::-1]]\n",
           "tests/test_moe.py tests/test_model.py"),
    Defect("a step's batch is read twice", "data/loader.py", "self._prefetched = step, self._read(step)",
           "self._prefetched = step, self._read(step - 1)", "tests/test_loop.py"),
    Defect("flash on CUDA is not repeatable", "kernels/attention/deterministic.py",
           "    with deterministic_mode():\n        grads = aten", "    if True:\n        grads = aten",
           "tests/test_attention_backends.py -k operator"),
    Defect("a compiled rotation turns the other way", "model/layers.py", "torch.where(first_D, -direction, direction)",
           "torch.where(first_D, direction, -direction)", "tests/test_model.py -k rotation"),
    Defect("off by one in the window", "data/loader.py", "start = window * self.n_positions",
           "start = window * self.n_positions + (window > 0)", "tests/test_data_loader.py"),
    Defect("every epoch has the same order", "data/loader.py", "permutation_key(self.seed, stream, epoch))",
           "permutation_key(self.seed, stream, 0 * epoch))", "tests/test_data_loader.py"),
    Defect("schedule off by one", "optim/schedule.py", "return (step + 1) / (config.warmup_steps + 1)",
           "return step / (config.warmup_steps + 1)", "tests/test_optim.py tests/test_loop.py"),
    Defect("clipped by the local norm", "distributed/sharded_model.py",
           'self.world.all_reduce_([sum_of_squares], name="the all-reduce of the gradient norm")', "pass", RANKS),
    Defect("replicated experts not summed", "distributed/sharded_model.py", "if self.groups.same_experts is not None:",
           "if False:", RANKS),
    Defect("experts' gradients are scaled like the others", "distributed/sharded_model.py",
           "// (self.mesh.expert if tensor.is_expert else 1)", "", RANKS),
    Defect("hybrid sharding never sums its replicas", "distributed/sharded_model.py",
           "self.model.set_requires_all_reduce(is_last)", "self.model.set_requires_all_reduce(False)", RANKS),
    Defect("gradients of rows go to the wrong ranks", "distributed/parallelize.py",
           "ctx.way_back = received_P, sent_P, group", "ctx.way_back = sent_P, received_P, group", RANKS),
    Defect("a stacked matrix is read from the wrong rows", "distributed/muon_sharding.py",
           "first + rows.start * stride", "first + rows.start", RANKS),
    Defect("freed memory is not kept", "device.py", "c_library.mallopt(-4, 0)", "pass",
           "tests/test_micro_batch.py -k page_fault"),
    Defect("free memory counts as a peak", "device.py", "c_library.malloc_trim(0)\n    if device.type",
           "pass\n    if device.type", "tests/test_micro_batch.py -k page_fault"),
    Defect("scarce memory is kept", "device.py", "None:\n        c_library.mallopt(-4, 65536)",
           "None and False:\n        c_library.mallopt(-4, 65536)",
           "tests/test_micro_batch.py -k page_fault"),
    Defect("few keys get no float32 attention", "kernels/attention/sdpa.py", "and n_keys <= FP32_MAX_KEYS", "and False",
           "tests/test_attention_backends.py -k few_keys"),
    Defect("many keys get float32 attention", "kernels/attention/sdpa.py", "and n_keys <= FP32_MAX_KEYS", "and True",
           "tests/test_attention_backends.py -k few_keys"),
    Defect("a CPU runs the grouped experts", "kernels/table.py", 'loop_first and name != "loop"', "False",
           "tests/test_kernel_choice.py -k one_by_one"),
    Defect("the gradient norm is a float32 sum", "distributed/sharded_model.py", 'if tensors[0].device.type == "cpu":',
           "if False:", "tests/test_loop.py -k large_gradient"),
    Defect("padding after the last row is not 0", "kernels/experts.py", "(0, 0, 0, rounded - end))",
           "(0, 0, 0, rounded - end), value=1.0)", "tests/test_kernels.py -k sixteen_bits"),
    Defect("other experts' rows leak into a narrow y", "kernels/experts.py", "if is_last or y_is_narrower else",
           "if is_last else", "tests/test_kernels.py -k sixteen_bits"),
    Defect("other experts' rows leak into a narrow x", "kernels/experts.py", "if is_last or not y_is_narrower else",
           "if is_last else", "tests/test_kernels.py -k sixteen_bits"),
    Defect("a product overwrites the next ones", "kernels/experts.py",
           "zip(_spans(x_RI, offsets_E), w_EIO.unbind(0),", "zip(_spans(x_RI, offsets_E)[::-1], w_EIO.unbind(0)[::-1],",
           "tests/test_kernels.py -k sixteen_bits"),
    Defect("each block has the first one's targets", "kernels/loss.py", "targets_N.split(size)",
           "[targets_N[: len(x)] for x in logits_NV.split(size)]", "tests/test_kernels.py -k loss"),
    Defect("only the last chunk's gradient counts", "kernels/loss.py", "sum_iO += product_iO.float()",
           "sum_iO.copy_(product_iO)", "tests/test_kernels.py -k loss"),
    Defect("the fast tokenizer accepts any merges", "data/tiktoken_encode.py",
           "if any([token.value for token in inner.model.tokenize(text)] != [text] for text in merged):", "if False:",
           "tests/test_data_tokenizer.py -k fast"),
    # memory
    Defect("a gradient from before an OOM stays", "engine/micro_batch.py",
           "        self._free_memory()\n        devices.release_freed_memory", "        devices.release_freed_memory",
           "tests/test_micro_batch.py"),
    Defect("ranks do not agree on out of memory", "engine/step.py", "(out_of_memory,) = world.max_int(sums is None)",
           "out_of_memory = sums is None", "tests/test_micro_batch.py -k one_rank"),
    Defect("the trial moves the selection bias", "engine/micro_batch.py", "                bias.copy_(value)",
           "                pass", "tests/test_micro_batch.py"),
    # checkpoints
    Defect("optimizer not restored", "engine/state.py",
           'optimizer.load_state_dict(checkpoint.read_tensors(path, "optimizer", rows))', "pass",
           "tests/test_runs.py -k never_stopped"),
    Defect("best so far not restored", "engine/resume.py", "    if not is_own:", "    if True:",
           "tests/test_runs.py tests/test_restart.py tests/test_loop.py"),
    Defect("no hash is checked", "checkpoint/read.py", "if file_entry(path / name) != manifest[name]:",
           "if False:", SAVES),
    Defect("another step's checkpoint counts", "checkpoint/read.py", 'step != int(path.name[5:])',
           "False", "tests/test_crashes.py -k another_steps"),
    Defect("a save is in place", "checkpoint/write.py", 'partial = self.folder / f".{target.name}.tmp"',
           "partial = target", "tests/test_crashes.py -k operations", "state.json"),
    Defect("old checkpoints go before the new one is there", "checkpoint/write.py",
           "            rename_durable(partial, target)\n            try:\n"
           "                prune(self.folder, self.config.keep, best_step, self.config.keep_every)\n",
           "            prune(self.folder, self.config.keep, best_step, self.config.keep_every)\n            try:\n"
           "                rename_durable(partial, target)\n",
           "tests/test_crashes.py -k operations", "nothing is removed before the new checkpoint is durable"),
    Defect("the best is not kept", "engine/state.py", "if state.best and self.config.checkpoint.keep_best else",
           "if False else", "tests/test_loop.py -k best_evaluation"),
    Defect("best kept without keep_best", "engine/state.py", "if state.best and self.config.checkpoint.keep_best else",
           "if state.best else", "tests/test_disk.py -k best"),
    Defect("best saved without keep_best", "train.py", "(is_best and config.checkpoint.keep_best)", "is_best",
           "tests/test_disk.py -k best"),
    Defect("the loss scale starts over", "engine/build.py", "elif state.loss_scale is None:", "else:",
           "tests/test_skips.py -k every_count"),
    Defect("the loss scale's count starts over", "engine/state.py", "return cls.model_validate_json(read_bytes(path))",
           "state = cls.model_validate_json(path.read_bytes())\n            if state.loss_scale:\n"
           "                state.loss_scale.good_steps = 0\n            return state",
           "tests/test_skips.py -k every_count"),
    Defect("the newest folder wins", "checkpoint/read.py", "(problem := corruption(path)) is None:",
           "True:", "tests/test_checkpoint.py"),
    Defect("pruning counts damaged checkpoints", "checkpoint/write.py", "if is_intact(path)]", "]",
           "tests/test_checkpoints_command.py"),
    Defect("NaN and Inf are saved", "checkpoint/write.py", "if not shard.tensor.isfinite().all():",
           "if False:", SAVES),
    Defect("a writing thread that ended is waited for", "checkpoint/write.py", "if not self._thread.is_alive():",
           "if False:", "tests/test_background_save.py -k wait_forever"),
    Defect("no copy before the save", "checkpoint/write.py",
           "self._buffer(kind, name, tensor).copy_(tensor, non_blocking=True)", "tensor", SAVES),
    Defect("no fsync of files", "checkpoint/write.py", "        os.fsync(file.fileno())\n", "", SAVES),
    Defect("no fsync of the folder", "files.py", "    source.rename(target)\n    fsync_path(target.parent)\n",
           "    source.rename(target)\n", SAVES),
    Defect("a failed save is not noticed", "engine/loop.py", "self.checkpoints.writer.failure is not None", "False",
           "tests/test_runs.py -k save_that"),
    Defect("rows before a rank's part are read", "checkpoint/read.py", "[max(first, start) - start :", "[0 :", SAVES),
    Defect("rows are not dropped at a restart", "logging/jsonl.py", "last < step <= start_step", "last < step",
           "tests/test_runs.py -k rows_after"),
    Defect("TensorBoard shows steps twice", "logging/tensorboard.py", "purge_step = run.start_step",
           "purge_step = run.steps", "tests/test_logging.py"),
    # skipped steps
    Defect("a skipped step moves the bias", "engine/step.py", "finish_step(sums, updated)", "finish_step(sums)",
           "tests/test_skips.py"),
    Defect("a skipped step is applied", "engine/step.py", "        if updated:\n            clip",
           "        if True:\n            clip", "tests/test_skips.py"),
    Defect("skips are not in the state", "engine/state.py", "return cls.model_validate_json(read_bytes(path))",
           "return cls.model_validate_json(read_bytes(path)).model_copy(update={'guard': cls.new().guard})",
           "tests/test_skips.py"),
    Defect("the window of losses starts over", "engine/guard.py", "losses: list[FiniteFloat] = []",
           "losses: list[float] = Field([], exclude=True)", "tests/test_skips.py -k every_count"),
    Defect("the window of norms starts over", "engine/guard.py", "norms: list[FiniteFloat] = []",
           "norms: list[float] = Field([], exclude=True)", "tests/test_skips.py -k every_count"),
    Defect("n_skipped starts over", "engine/state.py", '{"skips": guard}',
           '{"skips": guard | {"total": 0}}',
           "tests/test_skips.py -k every_count"),
    Defect("consecutive starts over", "engine/state.py", '{"skips": guard}',
           '{"skips": guard | {"in_a_row": 0}}',
           "tests/test_skips.py -k every_count"),
    Defect("consecutive_spikes starts over", "engine/state.py", '{"skips": guard}',
           '{"skips": guard | {"spikes": 0}}',
           "tests/test_skips.py -k every_count"),
    Defect("a NaN validation loss is accepted", "engine/loop.py", "elif not math.isfinite(val_loss):", "elif False:",
           "tests/test_skips.py -k evaluation"),
    Defect("ten skipped steps do not stop the run", "engine/loop.py", "    if state.guard.is_stuck:",
           "    if False:", "tests/test_skips.py"),
    # signals, locks, disks
    Defect("ranks do not agree on a signal", "engine/loop.py", "        if has_failed:",
           "        received = self.signal\n        if has_failed:", "tests/test_runs.py -k one_of_two"),
    Defect("a signal's save is not waited for", "train.py",
           "                checkpoints.wait()\n                return", "                return",
           "tests/test_signals.py -k not_announced"),
    Defect("a second signal is ignored", "engine/loop.py", "            os.kill(os.getpid(), number)\n",
           "            pass\n", "tests/test_signals.py -k second"),
    Defect("no lock", "files.py", "        lock.acquire(timeout=LOCK_WAIT_S)\n", "", "tests/test_restart.py -k twenty"),
    Defect("free space is not checked", "engine/build.py",
           '(problem := disk_shortage(stats, config, fresh=resume == "never"))', "(problem := None)",
           "tests/test_disk.py"),
    Defect("the model needs no space", "planning/report.py", "checkpoint_bytes(stats, config) + 4 * stats.n_parameters",
           "checkpoint_bytes(stats, config)", "tests/test_disk.py -k room"),
    Defect("existing checkpoints do not count", "planning/report.py",
           "needed -= 0 if fresh else", "needed -= 0 and",
           "tests/test_disk.py -k room"),
    Defect("a moved run's checkpoints count", "planning/report.py", "needed -= 0 if fresh else", "needed -=",
           "tests/test_disk.py -k room"),
    # issue faults: muon
    Defect("Muon steps along rounding errors", "optim/muon.py", "return x * (norm / NOISE_NORM).clamp(max=1).to(dtype)",
           "return x", "tests/test_optim.py -k rounding"),
    # issue faults: terminal
    Defect("a terminal obeys a name", "terminal/printable.py", 'ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}',
           'ESCAPED = {"Cs"}', "tests/test_terminal.py -k printable"),
    Defect("a newline in a name forges a line", "terminal/streams.py", 'write("stdout", printable(line) + "\\n")',
           'write("stdout", printable(line, TEXT) + "\\n")', "tests/test_terminal.py -k hostile_name"),
    Defect("a module prints by itself", "engine/step.py", 'print_note(f"step {state.step + 1}: {reason}',
           'print(f"step {state.step + 1}: {reason}', "tests/test_terminal.py -k one_room"),
    Defect("a lost result is no error", "terminal/streams.py", 'if reason := lost.get("stdout"):', "if reason := None:",
           "tests/test_terminal.py -k cannot_be_written"),
    Defect("a full disk for the output stops a run", "terminal/streams.py", "except OSError as error:",
           "except BrokenPipeError as error:", "tests/test_terminal.py -k does_not_stop"),
    Defect("records of libraries are raw", "terminal/libraries.py", "is_bare = type(handler)",
           "is_bare = False and type(handler)", "tests/test_terminal.py -k log_records"),
    Defect("generated escapes reach the terminal", "terminal/streams.py",
           "if is_exact and not sys.stdout.isatty()", "if is_exact", "tests/test_terminal.py -k exact_in_a_file"),
    Defect("blank lines push the run off the screen", "logging/console.py", "BLANK_LINES.sub(",
           "(lambda _, text: text)(", "tests/test_terminal.py -k sample"),
    Defect("a byte order mark begins a prompt", "generate.py", '"utf-8-sig"', '"utf-8"',
           "tests/test_terminal.py -k any_editor"),
    # issue faults: source
    Defect("a separator in a .txt is ordinary text", "data/text_files.py", 'format_of(path) == ".txt"', "False",
           "tests/test_data_prepare.py -k borders"),
    Defect("a separator in code is a border", "data/text_files.py", 'format_of(path) == ".txt"', "True",
           "tests/test_data_prepare.py -k ordinary"),
    Defect("a separator that a cut went through is lost", "data/chunks.py", "            previous += chunk\n",
           "            yield previous\n            previous = chunk\n", "tests/test_data_prepare.py -k borders"),
    Defect("a dump's old cache is used", "data/corpus.py", " + DUMP_SUFFIX * self.has_dumps", "",
           "tests/test_data_prepare.py -k did_not_split"),
    Defect("shared documents are not counted", "data/build.py",
           "n_shared=len(shared.hashes)", "n_shared=0",
           "tests/test_data_prepare.py -k validation_text"),
    Defect("a linked file is another file", "data/sources.py", "status.st_dev, status.st_ino,", "0, str(path),",
           "tests/test_data_prepare.py -k spellings"),
    Defect("bits per byte count normalized bytes", "engine/evaluate.py",
           "of_source.n_bytes * stream.n_bytes / stream.token_bytes", "of_source.n_bytes",
           "tests/test_loop.py -k normalization"),
    Defect("held-out text has the name of the first source", "data/corpus.py",
           "yield Chunk(text, split, source, index,", "yield Chunk(text, split, 0, index,",
           "tests/test_data_prepare.py -k name_of_their_source"),
    Defect("a small source is not evaluated", "data/loader.py", "max(1, n * end", "max(0, n * end",
           "tests/test_data_loader.py -k each_source"),
    Defect("a source's loss is that of all text", "engine/evaluate.py",
           "for indices in samples.evenly_spaced(n_tokens)",
           "for indices in [np.concatenate(samples.evenly_spaced(n_tokens))] * len(samples.split.streams)",
           "tests/test_loop.py -k spread_evenly"),
    Defect("eval.best has no effect", "engine/state.py",
           'row["val_loss"] if source is None else', 'row["val_loss"] if True else',
           "tests/test_runs.py -k eval_best"),
    # evaluation
    Defect("an answer's first token is not scored", "engine/tasks.py", "(*answer.context[-1:], *answer.tokens[:-1])",
           "(*answer.tokens[:1], *answer.tokens[:-1])", "tests/test_tasks.py -k plain_forward"),
    Defect("padding counts as an answer", "engine/tasks.py", "nats_RM.where(is_answer_RM, 0.0)", "nats_RM",
           "tests/test_tasks.py -k plain_forward"),
    Defect("a batch is longer than the context", "engine/tasks.py", "is_small and n_keys <= model.config.n_positions",
           "is_small", "tests/test_tasks.py -k long_answer"),
    Defect("ranks score the same batches", "engine/tasks.py", "batches[-1 if is_spare else first + world.rank]",
           "batches[-1 if is_spare else first]", "tests/test_tasks.py -k ranks_give"),
    Defect("a label's letter counts from 1", "data/items.py", 'ord(label.upper()) - ord("A")',
           'ord(label.upper()) - ord("A") + 1', "tests/test_tasks.py -k letter"),
    Defect("templates reach Python", "data/items.py", "SandboxedEnvironment(undefined",
           "__import__('jinja2').Environment(undefined", "tests/test_tasks.py -k python_object"),
    Defect("the average begins in the warm-up", "engine/step.py", "state.step >= config.schedule.warmup_steps",
           "True", "tests/test_average.py -k warm_up"),
    Defect("the average is not restored", "optim/optimizer.py",
           "self.averages = {name: averages[name].to(p.device) for name, (_, p) in self._owners.items()}",
           "pass",
           "tests/test_average.py -k resumes"),
    Defect("training goes on with the average", "distributed/sharded_model.py",
           "            self.reshard()\n            self._exchange(weights)\n", "            self.reshard()\n",
           "tests/test_average.py -k evaluates_both"),
    Defect("added tokens are not tried", "data/lossless.py",
           "return _reason_of_added_tokens(inner, n_bytes)", "return None", "tests/test_data_tokenizer.py -k lossy"),
    Defect("any normalizer is allowed", "data/lossless.py", 'part["type"] not in EQUIVALENT', "False",
           "tests/test_data_tokenizer.py -k lossy"),
    Defect("the model's end-of-text token is not read", "data/tokenizer.py",
           "names.append(inner.id_to_token(id_))", "pass", "tests/test_init_from.py -k own_tokenizer"),
    Defect("the export names GPT-2's end-of-text token", "data/tokenizer.py",
           '"pad_token"), self.separator)', '"pad_token"), END_OF_TEXT)', "tests/test_init_from.py -k own_tokenizer"),
    Defect("a folder of Transformers is sampled without its weights", "engine/load_run.py",
           "model.load_state_dict(model.state_dict() | weights)", "pass", "tests/test_load_model.py -k gpt2_is"),
    Defect("a tokenizer may have more tokens than the model", "engine/load_run.py",
           "if tokenizer.vocab_size > config.vocab_size:", "if False:", "tests/test_load_model.py -k lacks"),
    Defect("an export computes in bf16", "engine/load_run.py", "title, dtype, n_vocab = name, torch.float32,",
           "title, dtype, n_vocab = name, torch.bfloat16,", "tests/test_load_model.py -k export"),
    Defect("a path to the same text refuses the resume", "engine/resume.py", 'ignored.add("data")', "pass",
           "tests/test_restart.py -k spelling"),
    Defect("other text resumes", "engine/resume.py", "old, has_same_data = point.state.config, dataset.is_same_as(",
           "old, has_same_data = point.state.config, bool(", "tests/test_restart.py -k spelling"),
    Defect("other weights resume", "engine/resume.py", "point.state.init_from_sha256 == weights_sha256(config)", "True",
           "tests/test_init_from.py -k another_path"),
    # issue faults: data
    Defect("links to folders are not followed", "data/find_files.py", "followlinks=True", "followlinks=False",
           "tests/test_data_sources.py -k links_to_folders"),
    Defect("a loop of links is walked", "data/find_files.py", "entered.add(inode)", "pass",
           "tests/test_data_sources.py -k links_to_folders"),
    Defect("a closed folder is empty", "data/find_files.py", "onerror=_raise_unreadable", "onerror=None",
           "tests/test_data_sources.py -k cannot_be_read"),
    Defect("a glob passes over a closed folder", "data/find_files.py", "        _check_listable(path)\n",
           "        pass\n", "tests/test_data_sources.py -k cannot_be_read"),
    Defect("a hidden file is left out unsaid", "data/find_files.py",
           'left_out[parent / name] = "hidden file"', "pass", "tests/test_data_sources.py -k leaves_out"),
    Defect("later streams of a file are dropped", "data/decompress.py",
           "compressed = self.stream.unused_data or self.file.read(BLOCK_BYTES)", 'compressed = b""',
           "tests/test_data_sources.py -k all_streams"),
    Defect("a cut stream ends the file", "data/decompress.py",
           'raise UserError(f"{self.path}: cut short: the compressed data end in the middle")', 'return b""',
           "tests/test_data_sources.py -k all_streams"),
    Defect("a document is blank if its first chunk is", "data/chunks.py", "        if chunk.strip():\n",
           "        if not chunk.strip():\n            return True, chain(head, chunks)\n        if chunk.strip():\n",
           "tests/test_data_prepare.py -k white_space"),
    Defect("a page of parquet is read at any size", "data/row_files.py", "size > MAX_PAGE_BYTES and", "False and",
           "tests/test_data_sources.py -k fill_memory"),
    Defect("rows of parquet are read 256 at a time", "data/row_files.py", "min(max(MAX_BATCH_BYTES // largest, 1), ",
           "max(1, ", "tests/test_data_sources.py -k fill_memory"),
    Defect("a short last line alone is held out", "data/corpus.py", 'text.find("\\n", cut, middle)',
           'text.find("\\n", cut)', "tests/test_data_prepare.py -k one_line"),
    Defect("white space alone is held out", "data/corpus.py", "if not first < border < end:", "if False:",
           "tests/test_data_prepare.py -k one_line"),
    Defect("a leftover must be there to be removed", "data/dataset.py", "shutil.rmtree(leftover, ignore_errors=True)",
           "shutil.rmtree(leftover)", "tests/test_data_prepare.py -k while_leftovers"),
    Defect("words of any length are learned from", "data/tokenizer.py", "in LONG_RUN.finditer(text)",
           "in LONG_RUN.finditer(text[:0])", "tests/test_data_tokenizer.py -k cut_for"),
    Defect("a tokenizer's training holds Ctrl-C back", "data/tokenizer.py",
           "run_interruptibly(lambda: inner.train_from_iterator(words(), trainer))",
           "inner.train_from_iterator(words(), trainer)", "tests/test_data_prepare.py -k ctrl_c"),
    Defect("a tokenizer may have any token id", "data/tokenizer.py",
           "if (largest := max(inner.get_vocab().values())) >= MAX_VOCAB_SIZE:",
           "if False:", "tests/test_data_tokenizer.py -k token_id"),
    Defect("a long stage is silent", "data/progress.py", "while not end.wait(LINE_EVERY_S):", "while False:",
           "tests/test_data_prepare.py -k long_stage"),
    # what it reads
    Defect("a table's rows may have any length", "data/row_files.py", "len(fields) != len(names)", "False",
           "tests/test_row_files.py -k names_the_file"),
    Defect("a field ends at 131,072 characters", "data/row_files.py", "    csv.field_size_limit(MAX_LINE_BYTES)",
           "    csv.field_size_limit(131_072)", "tests/test_row_files.py -k huge_field"),
    Defect("an open quote reads the whole file", "data/row_files.py", "if n_bytes > MAX_LINE_BYTES:", "if False:",
           "tests/test_row_files.py -k without_an_end"),
    Defect("a searched folder reads every table", "data/find_files.py", "and not is_wanted(file)", "and False",
           "tests/test_row_files.py -k searched_folder"),
    Defect("packed JSON is left out", "data/find_files.py", "file.suffix.lower() == ONLY_BY_NAME",
           "name == ONLY_BY_NAME", "tests/test_row_files.py -k searched_folder"),
    Defect("a loop of links is not named", "data/find_files.py", "left_out[Path(parent)] = ENTERED", "pass",
           "tests/test_data_sources.py -k links_to_folders"),
    Defect("a transform codec decodes text", "config.py", "if canonical not in ENCODINGS.split():",
           "if not canonical:", "tests/test_text_options.py -k no_text_encoding"),
    Defect("a file that is not UTF-8 is read up to its fault", "data/sources.py",
           "self.not_utf8[path] = not is_utf8(path)", "self.not_utf8[path] = False",
           "tests/test_text_options.py -k left_out_whole"),
    Defect("split_on has no effect in code", "data/text_files.py", "split_on=options.split_on)",
           'split_on=options.split_on if format_of(path) == ".txt" else None)', "tests/test_text_options.py -k names"),
    Defect("a limit cuts off the document that reaches it", "data/corpus.py",
           "            if not is_blank:\n                budget.spend(text, starts)\n",
           "            if not is_blank:\n                budget.spend(text, starts)\n"
           "            if budget.is_spent:\n                return\n",
           "tests/test_text_options.py -k whole_documents"),
    Defect("a limit does not stop the reading", "data/corpus.py", "        if budget.is_spent:  # before",
           "        if False:  # before", "tests/test_text_options.py -k another_row"),
    Defect("a limit is no part of the cache key", "data/sources.py", "identity if reader.limit is None else",
           "identity if True else", "tests/test_text_options.py -k cache_key"),
    Defect("blank documents count", "data/corpus.py", "            if not is_blank:\n                budget",
           "            if True:\n                budget", "tests/test_text_options.py -k whole_documents"),
    # issue faults: log
    Defect("log: a damaged line past the checkpoint counts", "logging/jsonl.py", 'is_past = last >= start_step or',
           'is_past =', "tests/test_logging.py -k line_that_is_no_row"),
    Defect("log: a damaged line is lost", "logging/jsonl.py", 'file.write(line.data.removesuffix(b"\\n") + b"\\n")',
           "pass", "tests/test_logging.py -k line_that_is_no_row"),
    Defect("log: a wrong step hides the rows after it", "logging/jsonl.py", "previous < step < last", "False",
           "tests/test_logging.py -k line_that_is_no_row"),
    Defect("log: a folder in the place of a file ends the run", "files.py",
           "path.is_dir() and not path.is_symlink():\n                set_aside(path)", "False:\n                pass",
           "tests/test_run_folder.py -k everything_but"),
    Defect("log: a file in the place of a checkpoint hides it", "checkpoint/write.py", "if os.path.lexists(target):",
           "if False:", "tests/test_run_folder.py -k everything_but"),
    Defect("log: a time of 0 passes", "engine/state.py", "if self.step and not self.time_s:", "if False:",
           "tests/test_run_folder.py -k wrong_fields"),
    Defect("log: edited hashes are believed", "data/file_hashes.py",
           'if known == version and re.fullmatch("[0-9a-f]{64}", str(sha256)):', "if known == version:",
           "tests/test_run_folder.py -k edited_are_computed"),
    Defect("log: W&B skips what its process lost", "logging/wandb.py",
           "self.step = max([self.step, *logged])",
           "self.step = run.start_step", "tests/test_logging.py -k kill_9"),
    Defect("log: W&B has no row from before the restart", "logging/wandb.py",
           'read_rows(run.dir / "metrics.jsonl", after=before)', "()", "tests/test_logging.py -k kill_9"),
    Defect("log: a killed run is in use at its parent", "logging/wandb.py",
           'os.environ.pop("WANDB_SERVICE", None)', "pass", "tests/test_logging.py -k wandb"),
    Defect("log: a span forgets its lowest value", "logging/history.py", "self.low = later.low", "pass",
           "tests/test_report.py -k long_run"),
    Defect("log: spans do not widen", "logging/history.py", "while len(self.spans) > MAX_SPANS:", "while False:",
           "tests/test_report.py -k long_run"),
    Defect("log: a start believes curves of other rows", "logging/jsonl.py",
           "is_rising and _ends_at(path, spans[-1])", "is_rising", "tests/test_logging.py -k other_rows"),
    Defect("log: a flipped bit of a curve is believed", "logging/jsonl.py", "if line != _checked(data):", "if False:",
           "tests/test_logging.py -k not_interrupted"),
    Defect("log: a flipped bit of W&B's file is believed", "logging/wandb.py",
           " and checksum == zlib.crc32(data[at + 6 : at + 7 + length])", "", "tests/test_logging.py -k damaged_file"),
    Defect("a file named model is lost", "files.py", "        elif os.path.lexists(target):\n            set_aside",
           "        elif os.path.lexists(target):\n            remove", "tests/test_run_folder.py -k everything_but"),
    Defect("a path is expanded twice", "files.py", "or VARIABLE.search(path):", "or False:",
           "tests/test_cli.py -k expanded_again"),
    Defect("a run is shortened to the step that it has reached", "engine/resume.py",
           "config.steps > point.state.step", "config.steps >= point.state.step",
           "tests/test_restart.py -k shortened"),
    Defect("log: a start reads all rows", "logging/jsonl.py", "return History(spans, stride)", "return History()",
           "tests/test_logging.py -k end_of_a_long_log"),
    # issue faults: export
    Defect("padding takes part in the loss", "kernels/loss.py", "p_nV[:, n_vocab:] = -torch.inf",
           "p_nV[:, n_vocab:] += 0", "tests/test_kernels.py -k loss_equals"),
    Defect("Triton's padding has a gradient", "kernels/triton_loss.py", "is_counted & is_logit_B, grad_B",
           "is_counted, grad_B", "tests/test_triton_loss.py -k equal_the_reference"),
    Defect("a run trains its padding", "engine/build.py", "kernels.kernels, dtype, state.n_vocab)",
           "kernels.kernels, dtype)", "tests/test_init_from.py -k rows_beyond"),
    Defect("rows of init_from are cut", "engine/build.py", "max(n_vocab, check_pretrained(config).vocab_size)",
           "n_vocab", "tests/test_init_from.py -k weights_of_a_folder"),
    Defect("files of a run are open to all", "files.py", "path.chmod(partial.stat().st_mode & 0o666)",
           "path.chmod(0o644)", "tests/test_run_folder.py -k permissions"),
    Defect("an export has no limit of the length", "weights/hf/model_folder.py",
           '"max_length": config.n_positions + 1', '"max_length": 256 + config.n_positions',
           "tests/test_export.py -k shortest"),
    Defect("an export does not truncate", "data/tokenizer.py", '"model_max_length": n_positions',
           '"model_max_length": None', "tests/test_export.py -k shortest"),
    Defect("an export has no padding token", "data/tokenizer.py", '"unk_token", "pad_token")', '"unk_token")',
           "tests/test_export.py -k shortest"),
    Defect("the check forbids the end of text", "weights/open_export.py", "model.generation_config.eos_token_id, None",
           "(model.generation_config.eos_token_id,) * 2", "tests/test_export.py -k only_the_end_of_text"),
    Defect("the check compares tokens, not logits", "weights/export_check.py",
           "logits_TV.amax(1) - logits_TV.gather(1, continuation_T[:, None])[:, 0]",
           "(logits_TV.argmax(1) != continuation_T).float()", "tests/test_export.py -k equally_likely"),
    Defect("experts are listed before they are counted", "weights/hf/architecture.py", "return config.n_layer",
           "return 0", "tests/test_init_from.py -k cannot_be_used"),
    # issue faults: options
    Defect("a single weight is renormalized", "config.py", "return self.top_k > 1 if self.renormalize is None",
           "return True if self.renormalize is None", "tests/test_model.py -k gradient_from_the_text"),
    Defect("upcycling keeps a single weight", "weights/upcycle.py", '"renormalize": True', '"z_loss_weight": 0.0',
           "tests/test_upcycle.py -k renormal"),
    Defect("an inert router is not named", "options/notices.py", "ffn.top_k == 1 and ffn.is_renormalized",
           "ffn.top_k == 0", "tests/test_config.py -k notice_names"),
    Defect("decay ends one step late", "optim/schedule.py", "last_step = steps - 1", "last_step = steps",
           "tests/test_optim.py -k known_points"),
    Defect("a warm-up up to the end has no decay", "optim/schedule.py",
           "if step == last_step and step > 0:", "if False:", "tests/test_optim.py -k fits_into"),
    Defect("decay takes one step more", "optim/schedule.py", "steps - 1 - config.decay_steps",
           "steps - config.decay_steps", "tests/test_optim.py -k known_points"),
    Defect("a short run keeps its decay", "config.py", '"decay_steps": decay_steps', '"type": "wsd"',
           "tests/test_optim.py -k short_run"),
    Defect("a schedule is shortened silently", "options/notices.py", "if before is not None and before != (",
           "if None is (", "tests/test_config.py -k notice_names"),
    Defect("a flag leaves the file's length", "options/validate.py", "for name in chosen.keys() - {first}:",
           "for name in others:", "tests/test_horizon.py -k flag_replaces"),
    Defect("the first of two lengths wins silently", "options/validate.py", "for name in others:", "for name in ():",
           "tests/test_horizon.py -k two_lengths"),
    Defect("a run without a length is endless", "section.py", "values = {**values, names[0]: default}", "pass",
           "tests/test_horizon.py -k one_length"),
    Defect("tokens round down", "planning/horizon.py", "steps = -(-n_tokens // config.batch_tokens)",
           "steps = max(1, n_tokens // config.batch_tokens)", "tests/test_horizon.py -k round_up"),
    Defect("an epoch is counted in floats", "planning/horizon.py", "math.ceil(Fraction(str(config.epochs)) * ",
           "math.ceil(config.epochs * float(1) * ", "tests/test_horizon.py -k round_up"),
    Defect("an epoch is that of the largest source", "planning/horizon.py", "return sum(exact) * min(",
           "return sum(exact) * max(", "tests/test_horizon.py -k round_up"),
    Defect("tokens per parameter count idle experts", "planning/horizon.py", ".n_active_parameters", ".n_parameters",
           "tests/test_horizon.py -k round_up"),
    Defect("a share of the run rounds down", "config.py", "math.floor(Fraction(str(share)) * steps + Fraction(1, 2))",
           "math.floor(Fraction(str(share)) * steps)", "tests/test_horizon.py -k share_is_rounded"),
    Defect("a decay of no step", "config.py", '"decay_steps": max(1, share_of(steps, self.decay))',
           '"decay_steps": share_of(steps, self.decay)', "tests/test_horizon.py -k share_is_rounded"),
    Defect("1-sqrt is the root", "optim/schedule.py", "1 - math.sqrt(progress)", "math.sqrt(1 - progress)",
           "tests/test_horizon.py -k shape"),
    Defect("a twin reads other tokens", "twin.py", "if config.tokens_per_parameter is not None:", "if False:",
           "tests/test_horizon.py -k twin"),
    Defect("a schedule is shortened before the steps are known", "engine/build.py",
           "for line in schedule_notices(config):", "for line in ():", "tests/test_horizon.py -k does_not_fit"),
    Defect("an unset variable is a folder's name", "files.py", "if not (replacement := os.environ.get(name)):",
           'if (replacement := os.environ.get(name, name)) == "":', "tests/test_cli.py -k path_option"),
    Defect("a flag's path is taken as written", "options/cli.py", "        return expand_path(text)",
           "        return text", "tests/test_cli.py -k path_flag"),
    Defect("nobody looks for a compiler", "session.py", "if config.parallel.compile:", "if False:",
           "tests/test_compiled.py -k one_line_at_the_start"),
    Defect("a compiler's error asks for a restart", "kernels/compiler.py",
           "except torch._dynamo.exc.TorchDynamoException", "except KeyError", "tests/test_compiled.py -k own_line"),
    Defect("a model's size is not compared with memory", "planning/report.py", "        if needed > available:",
           "        if False:", "tests/test_plan.py -k room_for"),
    Defect("a capacity overflows", "model/moe.py", "capacity = min(n_rows, ", "capacity = max(0, ",
           "tests/test_moe.py -k beyond_every"),
    Defect("W&B's mode overrules the environment", "logging/wandb.py",
           'return (mode, "WANDB_MODE") if mode else (None, "")',
           'return "online", ""', "tests/test_logging.py -k wandbs_mode"),
    Defect("W&B's project overrules the environment", "logging/wandb.py", "config.project or theirs.project or",
           "config.project or", "tests/test_logging.py -k keeps_one_run"),
    # issue faults: plan
    Defect("each kind of layer counts once", "planning/memory.py", "for kind in reversed(self.kind_of_layer)",
           "for kind in set(self.kind_of_layer)", "tests/test_plan.py -k walk_of"),
    Defect("every micro-batch takes the memory of one sample more", "planning/memory.py",
           "first + (n_samples - 1) * (second - first)", "first + n_samples * (second - first)",
           "tests/test_plan.py -k walk_of"),
    Defect("recomputation keeps freed memory", "device.py", "c_library.mallopt(-3, 2**20)", "pass",
           "tests/test_micro_batch.py -k page_faults"),
    Defect("a run with recomputation does not release memory", "engine/build.py",
           "        devices.release_freed_memory(world.device)", "        pass", "tests/test_plan.py -k resident"),
    Defect("missing text stops a plan", "planning/report.py", "except UserError as error:  # a run is planned",
           "except KeyError as error:  # a run is planned", "tests/test_plan.py -k shipped"),
    # comparisons, lists of runs, figures by layer
    Defect("variants have other seeds", "compare/runner.py", '"seed": seed,', '"seed": seed + len(variant.label),',
           "tests/test_compare.py -k each_run_has"),
    Defect("a difference is not paired", "compare/results.py", "(run.value, baseline[run.seed]) for run",
           "(run.value, baseline[min(baseline)]) for run", "tests/test_compare.py -k paired"),
    Defect("higher is better for a loss", "compare/text.py", "(difference.mean < 0) == figure.lower_is_better",
           "(difference.mean > 0) == figure.lower_is_better", "tests/test_compare.py -k direction"),
    Defect("finished runs are trained again", "compare/runner.py",
           "if not is_finished(variant, seed, self.folder) and (variant.label, seed) not in self.failures",
           "if (variant.label, seed) not in self.failures", "tests/test_compare.py -k used_again"),
    Defect("equal FLOPs are equal tokens", "compare/runner.py",
           "config.batch_tokens * model_stats(config.model).flops_per_token", "config.batch_tokens * 1000",
           "tests/test_compare.py -k flops_set"),
    Defect("equal time without turns", "compare/runner.py", "TURN_S if has_turns else None",
           "None", "tests/test_compare.py -k take_turns"),
    Defect("steps are timed again", "compare/runner.py",
           "variant for variant in variants if variant.label not in stored", "variant for variant in variants",
           "tests/test_compare.py -k take_turns"),
    Defect("a comparison overwrites another", "compare/variants.py",
           "if changes := differing_options([stored, variant.config]):", "if changes := {}:",
           "tests/test_compare.py -k not_overwritten"),
    Defect("a diverged run ends the comparison", "compare/runner.py", "except UserError as error:  # such as",
           "except RestartNeeded as error:  # such as", "tests/test_compare.py -k diverges"),
    Defect("a paused run is not saved", "engine/loop.py", "or received > 0 or pause or", "or received > 0 or",
           "tests/test_compare.py -k take_turns"),
    Defect("caches in use are removed", "runs/__main__.py", "if not cache.runs and cache.unused_s",
           "if cache.unused_s", "tests/test_run_list.py -k caches"),
    Defect("a running run is listed as stopped", "runs/listing.py", '"running" if is_locked(path) else', "",
           "tests/test_run_list.py -k listed"),
    Defect("norms by layer count copies", "distributed/sharded_model.py", "not (is_split and self._is_copy(name))",
           "True", "tests/test_inspection.py -k two_ranks"),
    Defect("norms by layer are of one rank", "distributed/sharded_model.py",
           "        if is_split:\n            self.world.all_reduce_([sum_L]",
           "        if False:\n            self.world.all_reduce_([sum_L]", "tests/test_inspection.py -k two_ranks"),
    Defect("an update's norm is of the weights", "engine/inspection.py", "torch._foreach_sub_(copies, ",
           "torch._foreach_mul_(copies, ", "tests/test_inspection.py -k its_tensors"),
    Defect("a residual stream is too large", "engine/inspection.py", "(square_L / n_values).sqrt()",
           "(square_L / n_values * 2).sqrt()", "tests/test_inspection.py -k its_tensors"),
    Defect("patience is one evaluation", "engine/loop.py", 'state.best["step"] // every >= patience',
           'state.best["step"] // every >= 1', "tests/test_inspection.py -k patience"),
    Defect("a run out of patience has its last model", "engine/outputs.py",
           'config.checkpoint.final == "best" or is_out_of_patience(state, config)',
           'config.checkpoint.final == "best"', "tests/test_inspection.py -k patience"),
    Defect("a requested trace stays requested", "engine/trace.py", "self.request.unlink()", "pass",
           "tests/test_inspection.py -k on_demand"),
    Defect("a logarithmic axis begins too early", "logging/charts.py", "math.log(step / first) / span",
           "math.log(step / first / 10) / span", "tests/test_report.py -k frame"),
]  # fmt: skip


def main(words: list[str]) -> int:
    """Plant, test, report."""
    if words == ["--check"]:
        print(*misplaced(), sep="\n")
        return bool(misplaced())
    chosen = [defect for defect in DEFECTS if not words or any(word in defect.name for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=_not_source)
        for defect in chosen:
            began = time.perf_counter()
            result = plant(copy, defect)
            survivors += result != "caught"
            print(f"{result:<9} {time.perf_counter() - began:5.0f} s  {defect.name}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    return survivors > 0


def misplaced() -> list[str]:
    """List the defects whose text is not in their file, or whose tests do not exist."""
    wrong = []
    for defect in DEFECTS:
        if defect.text not in (ROOT / "training" / defect.file).read_text():
            wrong.append(f"{defect.name}: its text is not in {defect.file}")
        files, _, word = defect.tests.partition(" -k ")
        names = [name for file in files.split() for name in re.findall(r"def (test_\w+)", (ROOT / file).read_text())]
        if not any(word in name for name in names):
            wrong.append(f"{defect.name}: no test {defect.tests}")
    return wrong


def plant(copy: Path, defect: Defect) -> str:
    """Return "caught", "survived", "not there" (the text), or "else" (the tests failed with another message)."""
    path = copy / "training" / defect.file
    text = path.read_text()
    if defect.text not in text:
        return "not there"
    path.write_text(text.replace(defect.text, defect.planted, 1))
    variables = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *_split(defect.tests)]
        done = subprocess.run(command, cwd=copy, env=variables, capture_output=True, timeout=300, text=True)
        if done.returncode == 1 and not re.search(defect.says, done.stdout):
            return "else"
        return "caught" if done.returncode == 1 else "survived"
    except subprocess.TimeoutExpired:
        return "caught"  # a hang fails too
    finally:
        path.write_text(text)


def _not_source(folder: str, names: list[str]) -> set[str]:
    """Return the names that a copy leaves out; training/runs is source, runs at the root is not."""
    at_root = {".venv", ".git", "runs", "data_cache", "build"} if Path(folder) == ROOT else set()
    return (at_root | {"__pycache__"}) & set(names)


def _split(tests: str) -> list[str]:
    files, _, chosen = tests.partition(" -k ")
    return [*files.split(), *(["-k", chosen] if chosen else [])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
