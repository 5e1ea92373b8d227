"""Muon on sharded or replicated parameters: each matrix is gathered on one rank, processed there once, and sent back.

A call runs two all-to-alls: one sends all rows to the owners of the matrices, one sends the results back.
Shapes: X matrices of M x N; R rows; P ranks.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.distributed.world import World, all_to_all_rows


class RowBlock(NamedTuple):
    """Contiguous rows of a matrix that one rank holds."""

    matrix: int  # index of the matrix within the call
    rank: int
    rows: range  # of the matrix
    start: int  # index of the first row among all rows that the rank holds


class Transfer(NamedTuple):
    """The rows that this rank sends, or receives, in one all-to-all."""

    index_R: Tensor  # index of each row in the tensor to read from or write to; ordered by peer
    rows_P: list[int]  # number of rows for each peer


class Schedule(NamedTuple):
    """This rank's transfers in the two all-to-alls of a call."""

    n_owned: int  # number of matrices that this rank owns
    send: Transfer  # rows to the owners
    receive: Transfer
    send_back: Transfer  # results to every rank that holds the rows
    receive_back: Transfer


class MatrixGather:
    """A function that applies an operation to the full matrices of row-sharded parameters."""

    def __init__(
        self,
        shapes: dict[nn.Parameter, torch.Size],
        rows_of_rank: dict[nn.Parameter, list[range]],
        world: World,
        n_shards: int,
    ):
        """Store full shapes and, for each rank, its rows of the first dimension.

        Each group of `n_shards` consecutive ranks holds every row once, except rows of experts on other ranks.
        """
        self.shapes, self.rows_of_rank, self.world, self.n_shards = shapes, rows_of_rank, world, n_shards
        self._schedules: dict[tuple[int, ...], Schedule] = {}

    def __call__(
        self, parameters: list[nn.Parameter], tensors: list[Tensor], function: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Apply `function`, (X, M, N) -> (X, M, N), to the full matrices; return this rank's rows of the results.

        `tensors` holds this rank's rows of each parameter; all matrices have the same shape. Collective.
        """
        key = tuple(map(id, parameters))
        if key not in self._schedules:
            self._schedules[key] = self._schedule(parameters)
        n_owned, send, receive, send_back, receive_back = self._schedules[key]
        shape = n_owned, *self.shapes[parameters[0]][-2:]

        flat = [tensor.reshape(-1, shape[-1]) for tensor in tensors]
        received_RN = all_to_all_rows(torch.cat(flat)[send.index_R], send.rows_P, receive.rows_P)
        full_XMN = received_RN.new_empty(shape)
        full_XMN.view(-1, shape[-1])[receive.index_R] = received_RN
        result_RN = function(full_XMN).reshape(-1, shape[-1])  # also with X = 0: all ranks must send the same dtype
        received_RN = all_to_all_rows(result_RN[send_back.index_R], send_back.rows_P, receive_back.rows_P)
        results_RN = torch.empty_like(received_RN)
        results_RN[receive_back.index_R] = received_RN
        results = results_RN.split([len(rows) for rows in flat])
        return [result.view_as(tensor) for result, tensor in zip(results, tensors, strict=True)]

    def _schedule(self, parameters: list[nn.Parameter]) -> Schedule:
        """Assign each matrix to one of the ranks that hold its rows, round-robin, and list the transfers."""
        me, n_rows, blocks = self.world.rank, self.shapes[parameters[0]][-2], list(self._row_blocks(parameters))
        by_matrix: dict[int, list[RowBlock]] = {}
        for block in blocks:
            by_matrix.setdefault(block.matrix, []).append(block)
        owner = {matrix: holders[matrix % len(holders)].rank for matrix, holders in by_matrix.items()}
        owned = {matrix: n for n, matrix in enumerate(matrix for matrix in by_matrix if owner[matrix] == me)}
        # The owner's shard group holds each row once, so only its ranks send.
        needed = [block for block in blocks if block.rank // self.n_shards == owner[block.matrix] // self.n_shards]

        def as_holder(candidates: list[RowBlock]) -> Transfer:
            mine = [block for block in candidates if block.rank == me]
            return self._transfer((owner[block.matrix], block.start, len(block.rows)) for block in mine)

        def as_owner(candidates: list[RowBlock]) -> Transfer:
            mine = [block for block in candidates if block.matrix in owned]
            starts = (owned[block.matrix] * n_rows + block.rows.start for block in mine)
            return self._transfer(
                (block.rank, start, len(block.rows)) for block, start in zip(mine, starts, strict=True)
            )

        return Schedule(len(owned), as_holder(needed), as_owner(needed), as_owner(blocks), as_holder(blocks))

    def _transfer(self, spans: Iterable[tuple[int, int, int]]) -> Transfer:
        """Build a transfer from spans (peer, first row, number of rows)."""
        index_R, rows_P = [], [0] * self.world.size
        for peer, start, n_rows in sorted(spans, key=lambda span: span[0]):
            index_R += range(start, start + n_rows)
            rows_P[peer] += n_rows
        return Transfer(torch.tensor(index_R, dtype=torch.int64, device=self.world.device), rows_P)

    def _row_blocks(self, parameters: list[nn.Parameter]) -> Iterator[RowBlock]:
        """Yield the blocks of all ranks, matrix by matrix. A parameter is a matrix (M, N) or a stack (E, M, N)."""
        matrix, n_held = 0, [0] * self.world.size
        for shape, ranges in ((self.shapes[parameter], self.rows_of_rank[parameter]) for parameter in parameters):
            if len(shape) == 2:
                yield from (RowBlock(matrix, rank, rows, n_held[rank]) for rank, rows in enumerate(ranges) if rows)
                matrix += 1
            for index in range(shape[0]) if len(shape) == 3 else ():
                for rank, stack in enumerate(ranges):
                    if index in stack:
                        start = n_held[rank] + (index - stack.start) * shape[1]
                        yield RowBlock(matrix, rank, range(shape[1]), start)
                matrix += 1
            n_held = [
                n + len(rows) * (shape[1] if len(shape) == 3 else 1) for n, rows in zip(n_held, ranges, strict=True)
            ]
