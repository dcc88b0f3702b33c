"""Launches for lists that one program of the "triton" backend does not take alone: chunks of documents, one phase a launch.

See kernels/chunks.py for how lists are cut, kernels/fields.py for the sums in linear time. Sizes follow from shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pile_fast.batch import RankingBatch
from pile_fast.kernels import chunks, fields, layout, long_ensemble, long_loss, terms
from pile_fast.kernels.layout import Ensemble, How, Inputs, LossNumbers, Steps, Strided, unspecialized
from pile_fast.kernels.terms import Functions
from pile_fast.options import EnsembleOptions, LossOptions

# A label group of this many documents is a block of its own; smaller ones share a block of fewer than twice as many, whose
# pairs are summed directly. With direct sums alone, a chunk is what a program does at once.
WINDOW = 256
DIRECT_CHUNK = 128


class LongLists:
    """The chunks of a batch, and the phases over them.

    Args:
        batch: the batch.
        how: what kernels are compiled for.
        num_warps: of a program that has a chunk.
        pair_weight: ω, "none", "label_gap" or "gain_gap".
        labelled: whether any label pairs are asked for; else documents stay where they are.
        teachers: how many, 0 without an ensemble.
    """

    def __init__(self, batch: RankingBatch, how: How, num_warps: int, pair_weight: str, labelled: bool, teachers: int) -> None:
        some = batch.teacher_logits if batch.student_logits is None else batch.student_logits
        self.some, self.batch, self.how, self.num_warps = some, batch, how, num_warps
        self.queries, slots, packed = batch.num_queries, batch.slots, batch.packed
        documents = slots if packed else self.queries * slots
        self.mask = strided(None if batch.mask is None else batch.mask.view(torch.uint8))

        # At most so many: all lists packed into one row of slots, or those of one padded list times their number.
        split = not how.DIRECT
        self.chunk = 2 * WINDOW if split else DIRECT_CHUNK
        lists, times = (self.queries, 1) if packed else (1, self.queries)
        windows = slots // WINDOW
        long = min(lists, windows) if split else 0  # lists with blocks, and with moments
        blocks = 2 * windows + 2 * long if labelled and split else long
        rows = blocks + slots // self.chunk
        self.blocks, self.moment_rows = max(blocks * times, 1), max(rows * times, 1)
        self.count = (lists + rows) * times
        self.two_levels = rows > 2 * layout.SUPER.value

        labels = order = owner = self.short = None
        if batch.cu_seqlens is not None:
            if split:
                lengths = batch.cu_seqlens.diff()
                self.short = ((lengths > 0) & (lengths < WINDOW)).cumsum(0)
            positions = torch.arange(documents, device=some.device)
            owner = torch.searchsorted(batch.cu_seqlens[1:].to(positions.dtype), positions, right=True, out_int32=True)
        if labelled:
            labels, order = self._by_label(batch.labels, owner)
        self.labels = labels
        sizes = map(unspecialized, (self.queries, slots, documents))
        uncut = layout.Lists(None, None, None, None, order, owner, batch.cu_seqlens, *sizes)
        self.fields = self.floats(layout.FIELDS.value + teachers, documents)
        marks = some.new_empty(documents, dtype=torch.int64)
        tiles = (-(-documents // layout.TILE.value),)
        chunks.group_kernel[tiles](
            uncut, labels, self.fields, marks, slots.bit_length(),
            SPLIT=split, PAIR_WEIGHT=pair_weight, WINDOW=WINDOW, CHUNK=self.chunk, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        self.lists = uncut._replace(
            counts=marks.cumsum(0),
            chunk_begin=marks.new_full((self.count + 1,), documents),
            chunk_block=marks.new_empty(self.count, dtype=torch.int32),
            block_chunk=marks.new_empty(self.blocks + 1, dtype=torch.int32),
        )
        chunks.table_kernel[tiles](self.lists, num_warps=4, enable_fp_fusion=True)

    def _by_label(self, labels: Tensor, owner: Tensor | None) -> tuple[Tensor, Tensor]:
        """Labels by position, queries after each other, rising within each, NaN last; and where each comes from."""
        exact = labels.dtype in (torch.float64, torch.int64, torch.int32)
        labels = labels.to(torch.float64 if exact else torch.float32)
        labels = labels.masked_fill(labels.isinf(), torch.nan)
        if self.batch.mask is not None:
            labels = labels.masked_fill(~self.batch.mask, torch.nan)
        if owner is None:
            return labels.sort(dim=1, stable=True)
        labels, order = labels.sort(stable=True)
        _, again = owner[order].sort(stable=True)
        return labels[again], order[again]

    def launch(self, kernel: Any, grid: int | tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """A phase: a kernel over so many programs."""
        grid = grid if isinstance(grid, tuple) else (grid,)
        constants.setdefault("num_warps", self.num_warps)
        kernel[grid](self.state, self.lists, *arguments, **constants, enable_fp_fusion=True)

    def floats(self, *shape: int) -> Tensor:
        """Scratch memory."""
        return self.some.new_empty(shape, dtype=torch.float32)

    def _begin(self, teachers: int) -> None:
        """Room for the numbers of queries and chunks."""
        per_query = self.floats(self.queries, layout.query_floats(teachers))
        partials = self.floats(self.count, layout.chunk_floats(teachers))
        self.state = layout.State(self.fields, per_query, partials, unspecialized(teachers))
        self.pulls: Tensor | None = None
        self.losses: Tensor | None = None

    # -- the ensemble

    def ensemble(
        self, options: EnsembleOptions, steps: Steps, constants: Ensemble, logits: Tensor | None, weights: Tensor | None,
        trace: Tensor | None, pulls: Tensor | None, differences: bool,
    ) -> None:  # fmt: skip
        """All of the ensemble's phases. `differences`: nothing else of the logits is wanted."""
        teachers, prior = strided(self.batch.teacher_logits, 3), strided_prior(self.batch.prior)
        self._begin(self.batch.num_teachers)
        launch, how, each, query, by_document = self.launch, self.how, self.count, self.queries, constants.BY_DOCUMENT
        normalize = dict(NORMALIZE=constants.NORMALIZE)
        launch(long_ensemble.statistics_kernel, each, teachers, self.mask, prior, **normalize, how=how)
        launch(long_ensemble.query_statistics_kernel, query, prior, steps, **normalize, WINDOW=WINDOW, TILE=16, how=how)
        if constants.PAIRS:
            launch(long_ensemble.calibrate_kernel, each, teachers, self.mask, steps, ENSEMBLE=constants, how=how)
            launch(long_ensemble.counts_kernel, each, how=how)
            if trace is not None or not by_document:
                launch(long_ensemble.totals_kernel, query)
            self._improve(options.iterations, steps, constants, trace, pulls)
        if logits is not None:
            launch(
                long_ensemble.output_kernel, each, teachers, self.mask, logits, weights,
                ENSEMBLE=constants, DIFFERENCES=differences, how=how,
            )  # fmt: skip
        if weights is not None and not by_document:
            launch(long_ensemble.weights_kernel, query, weights, how=how, num_warps=1)

    def _improve(
        self, iterations: int, steps: Steps, constants: Ensemble, trace: Tensor | None, pulls: Tensor | None
    ) -> None:  # fmt: skip
        """The iterations, and the pulls after them."""
        launch, how, each, query = self.launch, self.how, self.count, self.queries
        if not how.DIRECT:
            self.prepare_fields(steps.offset, trace is not None)
        for iteration in range(iterations + 1):
            last = iteration == iterations
            if last and trace is None and pulls is None:
                return
            moves = not last or pulls is not None
            read = iteration % 2 if constants.BY_DOCUMENT else 0
            if not how.DIRECT:
                at = (layout.U.value + read, layout.SCORED_RANK.value, layout.U_GRID.value)
                self.label_fields(*at, steps.offset, moves, trace is not None)
            in_one_sweep = last and pulls is not None and trace is not None
            if trace is not None and not in_one_sweep:
                launch(long_ensemble.trace_kernel, each, self.losses, read, steps, how=how)
            if moves:
                launch(
                    long_ensemble.iterate_kernel, each, self.pulls, self.losses, read, steps,
                    ENSEMBLE=constants, LOSS=in_one_sweep, how=how,
                )  # fmt: skip
            if trace is not None:
                launch(long_ensemble.trace_sum_kernel, query, strided(trace), iteration)
            if last and pulls is not None:
                launch(long_ensemble.pull_sum_kernel, query, pulls, TILE=16, how=how)
            elif not last and not constants.BY_DOCUMENT:
                launch(long_ensemble.reweight_kernel, query, steps, TILE=16, how=how)
                launch(long_ensemble.tilt_kernel, each, steps, how=how)

    # -- the student's loss

    def loss(
        self, d: Functions | None, r: Functions | None, numbers: LossNumbers, target: Tensor | None,
        losses: Tensor | None, has_pairs: Tensor | None, gradient: Tensor | None,
    ) -> None:  # fmt: skip
        """All of the loss's phases, with the terms d of the distillation and r of the labels."""
        self._begin(1)
        launch, how, each, query = self.launch, how_of_loss(self.how, self.batch, r), self.count, self.queries
        kinds = dict(USE_D=d is not None, USE_R=r is not None)
        inputs = inputs_of(self.batch, target=target if d else None, labels=self.labels if r else None)
        launch(long_loss.load_kernel, each, inputs, R=r, how=how)
        launch(long_loss.prepare_kernel, query, numbers.inv_tau, D=d, WINDOW=WINDOW, how=how)
        if d or (r and (r.sums or r.gain)):
            launch(long_loss.scale_kernel, each, inputs, numbers, D=d, R=r, how=how)
        for kind, (term, values) in enumerate(((d, numbers.distill), (r, numbers.label))):
            if term:
                linear = not how.DIRECT and has_fields(term)
                in_linear_time = terms.module(term.key).fields(self) if linear else (None, None)
                own = how._replace(DIRECT=not linear)
                if term.survey:
                    launch(long_loss.survey_kernel, each, values, TERM=term, how=own)
                launch(long_loss.term_kernel, each, *in_linear_time, values, TERM=term, KIND=kind, how=own)
        launch(long_loss.total_kernel, query, inputs, losses, has_pairs, numbers, **kinds)
        if gradient is not None:
            launch(long_loss.gradient_kernel, each, gradient, self.mask, how=how, **kinds)

    # -- fields, for sums in linear time

    def prepare_fields(self, offset: float, losses: bool) -> None:
        """Room for the label fields, and the matrices for an offset."""
        sets = 1 + self.how.WEIGHTED
        self.room(sets, 2)
        self.pulls = self.floats(self.blocks, sets, layout.FIELD.value)
        self.losses = self.floats(self.blocks, sets, layout.FIELD.value) if losses else None
        self.label_matrices = self.matrices(offset)

    def room(self, sets: int, sides: int) -> None:
        """Room for so many sets of moments, and for what a block meets on so many sides."""
        width = layout.FIELD.value
        moments = self.floats(self.moment_rows, sets, width)
        # By chunk, so that some of them are not used.
        supers = self.floats(-(-self.count // layout.SUPER.value), sets, width) if self.two_levels else moments
        self.moments = fields.Moments(moments, self.short, supers, self.floats(self.blocks, sides, sets, width))

    def matrices(self, offset: float) -> Tensor:
        """The kernels' tables."""
        tables = self.floats(3, layout.MATRICES.value)
        fields.matrices_kernel[(layout.ENTRIES.value, 3)](tables, offset, num_warps=1, enable_fp_fusion=True)
        return tables

    def label_fields(
        self, value: int, part: int, grid: int, offset: float, pulls: bool, losses: bool, *,
        below: bool = True, above: bool = True, has_c: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Fields of the label pairs at the logits of field `value`, of the documents whose field `part` is not NaN; pulls from
        `below` and `above`. `has_c`: with documents' weights."""
        self.sum_moments(value, part, grid, of_self=False, has_c=has_c)
        self.launch(
            fields.apply_labels_kernel, (self.blocks, 1 + self.how.WEIGHTED), self.moments, self.label_matrices,
            self.pulls if pulls else None, self.losses if losses else None, grid, offset,
            SETS=1 + self.how.WEIGHTED, BELOW=below, ABOVE=above, num_warps=4,
        )  # fmt: skip
        return self.pulls, self.losses

    def sum_moments(self, value: int, part: int, grid: int, *, of_self: bool, has_c: bool) -> None:
        """What each block meets below and above; `of_self`: each query itself, at two logits on two grids. `has_c`: with
        documents' weights."""
        weighted = self.how.WEIGHTED and not of_self
        sets = 2 if of_self else 1 + weighted
        self.launch(
            fields.deposit_kernel, self.count, self.moments, value, part, grid,
            VALUES=1 + of_self, WEIGHTED=weighted, HAS_C=has_c, CHUNK=self.chunk, num_warps=2,
        )  # fmt: skip
        constants = dict(SELF=of_self, SETS=sets, num_warps=4)
        if self.two_levels:
            self.launch(fields.super_kernel, (self.moments.supers.shape[0], sets), self.moments, grid, **constants)
        self.launch(
            fields.collect_kernel, (self.queries, sets) if of_self else (self.blocks, 2 * sets), self.moments, grid,
            TWO_LEVELS=self.two_levels, **constants,
        )  # fmt: skip


def strided(tensor: Tensor | None, axes: int = 2) -> Strided:
    """A tensor with its strides, 0 for the queries of a packed one; `axes`: of a padded one, with teachers or without."""
    if tensor is None:
        return _NOTHING
    strides = (0,) * (axes - tensor.dim()) + tensor.stride() + (0,)
    return Strided(tensor, *map(unspecialized, strides[:3]))


def inputs_of(batch: RankingBatch, *, target: Tensor | None, labels: Tensor | None, teachers: bool = False) -> Inputs:
    """What kernels read of a batch."""
    queries = batch.query_weights
    of_queries = _NOTHING if queries is None else _NOTHING._replace(pointer=queries, query=unspecialized(queries.stride(0)))
    return Inputs(
        strided(batch.student_logits), strided(batch.teacher_logits if teachers else None, 3), strided(target), strided(labels),
        strided(None if batch.mask is None else batch.mask.view(torch.uint8)), strided_prior(batch.prior),
        strided(batch.weights), of_queries, batch.cu_seqlens,
    )  # fmt: skip


def strided_prior(prior: Tensor | None) -> Strided:
    """A prior with its strides, of queries and teachers."""
    of_prior = strided(prior)
    return of_prior._replace(teacher=of_prior.document)


_NOTHING = Strided(None, *map(unspecialized, (0, 0, 0)))


def has_fields(term: Functions | None) -> bool:
    """Whether a term's pairs can be summed in linear time."""
    return term is not None and hasattr(terms.module(term.key), "fields")


def how_of_loss(how: How, batch: RankingBatch, label_loss: Functions | None) -> How:
    """What the loss's kernels are compiled for."""
    return how._replace(HAS_C=batch.weights is not None, GAINS=label_loss is not None and label_loss.gain is not None)


def used_terms(options: LossOptions) -> tuple[Functions | None, Functions | None]:
    """The functions of the loss's two terms; None where alpha leaves one out."""
    return (
        terms.functions(options.distillation.key) if options.alpha > 0 else None,
        terms.functions(options.label_loss.key) if options.alpha < 1 else None,
    )
