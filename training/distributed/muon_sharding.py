"""Muon on sharded or replicated parameters: each matrix is gathered on one rank, processed there once, and sent back.

A call runs two all-to-alls: one sends all rows to the owners of the matrices, one sends the results back.
Shapes: X matrices of M x N; R rows; P ranks.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.distributed.world import World, all_to_all_rows


class Transfer(NamedTuple):
    """The rows that this rank sends, or receives, in one all-to-all."""

    index_R: Tensor  # index of each row in the tensor to read from or write to; ordered by peer
    rows_P: list[int]  # number of rows for each peer


@dataclass
class MatrixGather:
    """A function that applies an operation to the full matrices of row-sharded parameters."""

    shapes: dict[nn.Parameter, torch.Size]  # of the full parameters
    rows_of_rank: dict[nn.Parameter, list[range]]  # the rows of the first dimension that each rank holds
    world: World
    n_shards: int  # each group of this many consecutive ranks holds every row once, except rows of other ranks' experts
    _schedules: dict[tuple[int, ...], tuple[int, list[Transfer]]] = field(default_factory=dict, init=False)

    def __call__(
        self, parameters: list[nn.Parameter], tensors: list[Tensor], function: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Apply `function`, (X, M, N) -> (X, M, N), to the full matrices; return this rank's rows of the results.

        `tensors` holds this rank's rows of each parameter; all matrices have the same shape. Collective.
        """
        key = tuple(map(id, parameters))
        if key not in self._schedules:
            self._schedules[key] = self._schedule(parameters)
        n_owned, (send, receive, send_back, receive_back) = self._schedules[key]
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

    def _schedule(self, parameters: list[nn.Parameter]) -> tuple[int, list[Transfer]]:
        """Assign each matrix to one of the ranks that hold its rows, round-robin.

        Return the number of matrices that this rank owns, and its transfers: rows to the owners, the same received,
        results back to every rank that holds the rows, the same received.
        """
        me, n_ranks, n_rows = self.world.rank, self.world.size, self.shapes[parameters[0]][-2]
        ranges_P = [tuple(self.rows_of_rank[parameter][rank] for parameter in parameters) for rank in range(n_ranks)]
        held = {ranges: self._held_rows(parameters, ranges) for ranges in set(ranges_P)}  # replicas share an entry
        matrices = {ranges: (row_R // n_rows).unique_consecutive().tolist() for ranges, row_R in held.items()}
        holders = defaultdict(list)
        for rank, ranges in enumerate(ranges_P):
            for matrix in matrices[ranges]:
                holders[matrix].append(rank)
        owner_X = torch.tensor([holders[matrix][matrix % len(holders[matrix])] for matrix in range(len(holders))])
        position_X = (owner_X == me).cumsum(0) - 1  # of an owned matrix among the owned ones

        owner_R = owner_X[held[ranges_P[me]] // n_rows]
        as_holder_P = owner_R.argsort(stable=True).split(owner_R.bincount(minlength=n_ranks).tolist())
        owned = {ranges: row_R[owner_X[row_R // n_rows] == me] for ranges, row_R in held.items()}
        owned = {ranges: position_X[row_R // n_rows] * n_rows + row_R % n_rows for ranges, row_R in owned.items()}
        as_owner_P = [owned[ranges] for ranges in ranges_P]

        def transfer(index_P: Sequence[Tensor], peers: range) -> Transfer:
            index_R = torch.cat([index_P[peer] for peer in peers])
            rows_P = [len(index_P[rank]) if rank in peers else 0 for rank in range(n_ranks)]
            return Transfer(index_R.to(self.world.device), rows_P)

        # The owner's shard group holds each row once, so only its ranks send.
        first = me - me % self.n_shards
        group, everyone = range(first, first + self.n_shards), range(n_ranks)
        pairs = (as_holder_P, group), (as_owner_P, group), (as_owner_P, everyone), (as_holder_P, everyone)
        return int((owner_X == me).sum()), [transfer(*pair) for pair in pairs]

    def _held_rows(self, parameters: list[nn.Parameter], ranges: tuple[range, ...]) -> Tensor:
        """Return a rank's rows, ascending and numbered through all matrices: row i belongs to matrix i // M."""
        held, first = [], 0
        for parameter, rows in zip(parameters, ranges, strict=True):
            shape = self.shapes[parameter]
            stride = shape[1:-1].numel()  # a parameter is a matrix (M, N) or a stack (E, M, N)
            start = first + rows.start * stride
            held.append(torch.arange(start, start + len(rows) * stride))
            first += shape[0] * stride
        return torch.cat(held)
