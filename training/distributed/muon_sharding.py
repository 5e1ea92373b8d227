"""Matrices whose rows lie on several ranks, or that several ranks hold: each is worked on once, by one of them.

Rows travel to the matrix's rank and what comes of them travels back, in one message to each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.distributed.world import World

Work = Callable[[Tensor], Tensor]  # of matrices, (X, M, N) -> (X, M, N)


class Piece(NamedTuple):
    """Rows of a matrix, on a rank."""

    matrix: int  # its number in a call
    rank: int
    rows: range  # of the matrix
    parameter: int  # its number in a call
    first: int  # where the rows begin in the rank's tensor of the parameter, seen as (rows, N)


class Way(NamedTuple):
    """Pieces that go from one rank to another, in the order of the ranks."""

    pieces: list[Piece]
    rows_P: list[int]  # for each rank


class Route(NamedTuple):
    """Of one call: there, to the matrix's rank, and back; as this rank sends and receives."""

    mine: dict[int, int]  # the matrices of this rank, by number, and the place of each among them
    sent: Way
    come: Way
    back: Way
    returned: Way


class MatrixGather:
    """Work on the matrices of parameters of which this rank has some rows."""

    def __init__(
        self,
        shapes: dict[nn.Parameter, torch.Size],
        rows: dict[nn.Parameter, list[range]],
        world: World,
        n_shards: int,
    ):
        """`shapes` are those of the whole parameters, `rows` what each rank has of their first dimension.

        Every `n_shards` ranks in a row hold a copy of everything but experts that are elsewhere.
        """
        self.shapes, self.rows, self.world, self.n_shards = shapes, rows, world, n_shards
        self.routes: dict[tuple[int, ...], Route] = {}

    def __call__(self, parameters: list[nn.Parameter], tensors: list[Tensor], work: Work) -> list[Tensor]:
        """`work` on every matrix of parameters whose matrices have equal shape; tensors and results are this
        rank's rows. Collective."""
        key = tuple(map(id, parameters))
        if key not in self.routes:
            self.routes[key] = self._route(parameters)
        route, (n_rows, width) = self.routes[key], self.shapes[parameters[0]][-2:]
        flat = [tensor.reshape(-1, width) for tensor in tensors]
        sent = [_of(flat[p.parameter], p.first, p) for p in route.sent.pieces]
        came = _exchanged(sent, route.sent, route.come, flat[0])
        whole = flat[0].new_empty(len(route.mine), n_rows, width)
        for piece, x in zip(route.come.pieces, came, strict=True):
            _of(whole[route.mine[piece.matrix]], piece.rows.start, piece).copy_(x)
        done = work(whole)  # of no matrices too: all ranks have to agree on the type
        back = [_of(done[route.mine[p.matrix]], p.rows.start, p) for p in route.back.pieces]
        returned = _exchanged(back, route.back, route.returned, done[:0].reshape(-1, width))
        results = [done.new_empty(x.shape) for x in flat]
        for piece, x in zip(route.returned.pieces, returned, strict=True):
            _of(results[piece.parameter], piece.first, piece).copy_(x)
        return [result.view_as(tensor) for result, tensor in zip(results, tensors, strict=True)]

    def _route(self, parameters: list[nn.Parameter]) -> Route:
        """Who works on which matrix, and what travels for it."""
        me, pieces = self.world.rank, list(self._pieces(parameters))
        of_matrix: dict[int, list[Piece]] = {}
        for piece in pieces:
            of_matrix.setdefault(piece.matrix, []).append(piece)
        owner = {matrix: some[matrix % len(some)].rank for matrix, some in of_matrix.items()}
        copy = {matrix: rank // self.n_shards for matrix, rank in owner.items()}  # in which each row lies once
        needed = [p for p in pieces if p.rank // self.n_shards == copy[p.matrix]]

        def way(among: list[Piece], end: Callable[[Piece], int], other: Callable[[Piece], int]) -> Way:
            mine: list[list[Piece]] = [[] for _ in range(self.world.size)]
            for p in among:
                if end(p) == me:
                    mine[other(p)].append(p)
            return Way([p for some in mine for p in some], [sum(len(p.rows) for p in some) for some in mine])

        def holds(p: Piece) -> int:
            return p.rank

        def works(p: Piece) -> int:
            return owner[p.matrix]

        mine = [matrix for matrix in of_matrix if owner[matrix] == me]
        there = way(needed, holds, works), way(needed, works, holds)
        return Route(
            {matrix: place for place, matrix in enumerate(mine)},
            *there,
            way(pieces, works, holds),
            way(pieces, holds, works),
        )

    def _pieces(self, parameters: list[nn.Parameter]) -> Iterator[Piece]:
        """Everything that ranks hold of these parameters' matrices; a matrix's one after the other."""
        matrix = 0
        for number, parameter in enumerate(parameters):
            shape = self.shapes[parameter]
            if len(shape) == 2:
                for rank, rows in enumerate(self.rows[parameter]):
                    if rows:
                        yield Piece(matrix, rank, rows, number, 0)
                matrix += 1
                continue
            for index in range(shape[0]):
                for rank, stack in enumerate(self.rows[parameter]):
                    if index in stack:
                        yield Piece(matrix, rank, range(shape[1]), number, (index - stack.start) * shape[1])
                matrix += 1


def _of(tensor: Tensor, first: int, piece: Piece) -> Tensor:
    return tensor[first : first + len(piece.rows)]


def _exchanged(tensors: list[Tensor], sent: Way, come: Way, like: Tensor) -> tuple[Tensor, ...]:
    """What comes, piece by piece, for what is sent; (rows, N) of the type of `like`."""
    came = like.new_empty(sum(come.rows_P), like.shape[1])
    dist.all_to_all_single(came, torch.cat([like[:0], *tensors]), come.rows_P, sent.rows_P)
    return came.split([len(p.rows) for p in come.pieces])
