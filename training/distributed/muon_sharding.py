"""Muon on sharded or replicated parameters: each matrix is gathered on one rank, processed there once, and sent back.

All rows of one call travel in one all-to-all to the owners of the matrices and one back. X matrices of M x N; P ranks.
"""

from __future__ import annotations

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
    parameter: int  # index of the parameter within the call
    offset: int  # of the first row in the rank's tensor, viewed as (rows, N)


class Transfer(NamedTuple):
    """The rows that this rank sends, or receives, in one all-to-all."""

    blocks: list[RowBlock]  # ordered by peer
    rows_P: list[int]  # number of rows for each peer


class Schedule(NamedTuple):
    """The two all-to-alls of one call, as this rank takes part in them."""

    index_of_owned: dict[int, int]  # matrix -> its index among those that this rank owns
    send: Transfer  # rows to the owners
    receive: Transfer
    send_back: Transfer  # results to every rank that holds the rows
    receive_back: Transfer


class MatrixGather:
    """An operation on the full matrices of parameters of which this rank holds some rows."""

    def __init__(
        self,
        shapes: dict[nn.Parameter, torch.Size],
        rows_of_rank: dict[nn.Parameter, list[range]],
        world: World,
        n_shards: int,
    ):
        """`shapes` are full shapes, `rows_of_rank` the rows of the first dimension that each rank holds.

        Each group of `n_shards` consecutive ranks holds every row once, except rows of experts on other ranks.
        """
        self.shapes, self.rows_of_rank, self.world, self.n_shards = shapes, rows_of_rank, world, n_shards
        self._schedules: dict[tuple[int, ...], Schedule] = {}

    def __call__(
        self, parameters: list[nn.Parameter], tensors: list[Tensor], function: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Apply `function`, (X, M, N) -> (X, M, N), to the full matrices and return this rank's rows of the results.

        `tensors` are this rank's rows, one tensor for each parameter; all matrices are M x N. Collective.
        """
        key = tuple(map(id, parameters))
        if key not in self._schedules:
            self._schedules[key] = self._schedule(parameters)
        schedule, (n_rows, width) = self._schedules[key], self.shapes[parameters[0]][-2:]
        index = schedule.index_of_owned

        flat = [tensor.reshape(-1, width) for tensor in tensors]
        sent = [_slice(flat[block.parameter], block.offset, block) for block in schedule.send.blocks]
        full_XMN = flat[0].new_empty(len(index), n_rows, width)
        for block, rows in _exchange(sent, schedule.send, schedule.receive, flat[0]):
            _slice(full_XMN[index[block.matrix]], block.rows.start, block).copy_(rows)

        result_XMN = function(full_XMN)  # also where X is 0: it decides the dtype that all ranks exchange
        sent = [_slice(result_XMN[index[b.matrix]], b.rows.start, b) for b in schedule.send_back.blocks]
        results = [result_XMN.new_empty(rows.shape) for rows in flat]
        like = result_XMN[:0].reshape(-1, width)
        for block, rows in _exchange(sent, schedule.send_back, schedule.receive_back, like):
            _slice(results[block.parameter], block.offset, block).copy_(rows)
        return [result.view_as(tensor) for result, tensor in zip(results, tensors, strict=True)]

    def _schedule(self, parameters: list[nn.Parameter]) -> Schedule:
        """Assign each matrix to an owner, in turn among the ranks that hold rows of it, and list the transfers."""
        me, blocks = self.world.rank, list(self._row_blocks(parameters))
        by_matrix: dict[int, list[RowBlock]] = {}
        for block in blocks:
            by_matrix.setdefault(block.matrix, []).append(block)
        owner = {matrix: holders[matrix % len(holders)].rank for matrix, holders in by_matrix.items()}
        # Within the owner's group of shards each row exists once; the other replicas need not send theirs.
        needed = [block for block in blocks if block.rank // self.n_shards == owner[block.matrix] // self.n_shards]

        def as_holder(candidates: list[RowBlock]) -> Transfer:
            return self._transfer((owner[block.matrix], block) for block in candidates if block.rank == me)

        def as_owner(candidates: list[RowBlock]) -> Transfer:
            return self._transfer((block.rank, block) for block in candidates if owner[block.matrix] == me)

        owned = [matrix for matrix in by_matrix if owner[matrix] == me]
        index_of_owned = {matrix: index for index, matrix in enumerate(owned)}
        return Schedule(index_of_owned, as_holder(needed), as_owner(needed), as_owner(blocks), as_holder(blocks))

    def _transfer(self, blocks_by_peer: Iterable[tuple[int, RowBlock]]) -> Transfer:
        pairs, rows_P = sorted(blocks_by_peer, key=lambda pair: pair[0]), [0] * self.world.size
        for peer, block in pairs:
            rows_P[peer] += len(block.rows)
        return Transfer([block for _, block in pairs], rows_P)

    def _row_blocks(self, parameters: list[nn.Parameter]) -> Iterator[RowBlock]:
        """Yield the blocks of all ranks, matrix by matrix. A parameter is a matrix (M, N) or a stack (E, M, N)."""
        matrix = 0
        for number, parameter in enumerate(parameters):
            shape, held = self.shapes[parameter], list(enumerate(self.rows_of_rank[parameter]))
            if len(shape) == 2:
                yield from (RowBlock(matrix, rank, rows, number, 0) for rank, rows in held if rows)
                matrix += 1
                continue
            for index in range(shape[0]):
                for rank, stack in held:
                    if index in stack:
                        yield RowBlock(matrix, rank, range(shape[1]), number, (index - stack.start) * shape[1])
                matrix += 1


def _slice(tensor: Tensor, start: int, block: RowBlock) -> Tensor:
    return tensor[start : start + len(block.rows)]


def _exchange(tensors: list[Tensor], send: Transfer, receive: Transfer, like: Tensor) -> Iterator[tuple]:
    """Send `tensors`, the rows of each block; return the received blocks and their rows, with the dtype of `like`."""
    received = all_to_all_rows(torch.cat([like[:0], *tensors]), send.rows_P, receive.rows_P)
    return zip(receive.blocks, received.split([len(block.rows) for block in receive.blocks]), strict=True)
