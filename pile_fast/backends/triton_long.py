"""Launches for lists that one program of the "triton" backend does not take alone: chunks of documents, one phase a launch.

See kernels/chunks.py for how lists are cut, kernels/fields.py for the sums in linear time. Sizes follow from shapes alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pile_fast.batch import RankingBatch
from pile_fast.kernels import chunks, fields, long_ensemble, long_loss
from pile_fast.kernels.ensemble import FIELDS, GRID, SCALARS, SCORED_RANK, U
from pile_fast.kernels.loss import S_SCALED, Z_SCALED, Z
from pile_fast.options import EnsembleOptions, LossOptions

# A label group of this many documents is a block of its own; smaller ones share a block of fewer than twice as many, whose
# pairs are summed directly. With direct sums alone, a chunk is what a program does at once.
WINDOW = 256
DIRECT_CHUNK = 128
TILE = 256  # positions, or chunks, that one program looks at in one go where nothing else is to be done

WARPS_1, WARPS_2, WARPS_4 = (dict(num_warps=warps, enable_fp_fusion=True) for warps in (1, 2, 4))


class LongLists:
    """The chunks of a batch, and the phases over them.

    Args:
        batch: the batch.
        config: block sizes of the kernels, `triton._config`'s.
        split: sums between blocks in linear time; else all sums are direct.
        pair_weight: ω, "none", "label_gap" or "gain_gap".
        labelled: whether any label pairs are asked for; else documents stay where they are.
        approx: reciprocals in one instruction.
    """

    def __init__(self, batch: RankingBatch, config: dict, split: bool, pair_weight: str, labelled: bool, approx: bool):
        some = batch.teacher_logits if batch.student_logits is None else batch.student_logits
        self.some, self.batch, self.config = some, batch, config
        self.queries, self.slots, self.packed = batch.num_queries, batch.slots, batch.packed
        self.documents = self.slots if self.packed else self.queries * self.slots
        self.weighted, self.approx = pair_weight != "none", approx
        self.split = split
        self.launch_options = dict(num_warps=config["num_warps"], enable_fp_fusion=config["enable_fp_fusion"])
        self.rows = {"BR": config["BR"]}
        self.pair_tile = {"BR": config["BR"], "BC": config["BC"]}
        self.mask = None if batch.mask is None else batch.mask.view(torch.uint8)
        self.mask_arguments = (self.mask, *(self.mask.stride() if self.mask is not None else (0, 0)))

        # At most so many: all lists packed into one row of slots, or those of one padded list times their number.
        self.chunk = 2 * WINDOW if split else DIRECT_CHUNK
        lists, times = (self.queries, 1) if self.packed else (1, self.queries)
        windows = self.slots // WINDOW
        long = min(lists, windows) if split else 0  # lists with blocks, and with moments
        blocks = 2 * windows + 2 * long if labelled and split else long
        rows = blocks + self.slots // self.chunk
        self.blocks, self.moment_rows = max(blocks * times, 1), max(rows * times, 1)
        self.count = (lists + rows) * times
        self.two_levels = rows > 2 * fields.SUPER.value
        self._cut(labelled, pair_weight)

    def _cut(self, labelled: bool, pair_weight: str) -> None:
        batch, documents = self.batch, self.documents
        labels = self.order = self.owner = self.short = None
        if self.packed:
            if self.split:
                lengths = batch.cu_seqlens.diff()
                self.short = ((lengths > 0) & (lengths < WINDOW)).cumsum(0)
            positions = torch.arange(documents, device=self.some.device)
            ends = batch.cu_seqlens[1:].to(positions.dtype)
            self.owner = torch.searchsorted(ends, positions, right=True, out_int32=True)
        if labelled:
            labels, self.order = self._by_label(batch.labels)
        self.fields = self.some.new_empty((FIELDS.value, documents), dtype=torch.float32)
        marks = self.some.new_empty(documents, dtype=torch.int64)
        tiles = -(-documents // TILE)
        chunks.group_kernel[(tiles,)](
            labels, self.owner, batch.cu_seqlens, self.fields, marks, self.queries, self.slots, documents,
            self.slots.bit_length(),
            LABELLED=labelled, SPLIT=self.split, WEIGHT=pair_weight, PACKED=self.packed, WINDOW=WINDOW, CHUNK=self.chunk,
            TILE=TILE, **WARPS_4,
        )  # fmt: skip
        self.counts = marks.cumsum(0)
        self.chunk_begin = marks.new_full((self.count + 1,), documents)
        self.chunk_block = marks.new_empty(self.count, dtype=torch.int32)
        self.block_chunk = marks.new_empty(self.blocks + 1, dtype=torch.int32)
        chunks.table_kernel[(tiles,)](
            self.counts, self.chunk_begin, self.chunk_block, self.block_chunk, documents, TILE=TILE, **WARPS_4
        )
        self.where = (self.chunk_begin, self.owner, batch.cu_seqlens)
        self.where_of_block = (
            self.chunk_begin, self.chunk_block, self.block_chunk, self.counts, self.owner, batch.cu_seqlens,
        )  # fmt: skip
        self.sizes = (self.queries, self.slots, documents)

    def _by_label(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels by position, queries after each other, rising within each, NaN last; and where each comes from."""
        exact = labels.dtype in (torch.float64, torch.int64, torch.int32)
        labels = labels.to(torch.float64 if exact else torch.float32)
        labels = labels.masked_fill(labels.isinf(), torch.nan)
        if self.batch.mask is not None:
            labels = labels.masked_fill(~self.batch.mask, torch.nan)
        if not self.packed:
            return labels.sort(dim=1, stable=True)
        labels, order = labels.sort(stable=True)
        _, again = self.owner[order].sort(stable=True)
        return labels[again], order[again]

    # -- the ensemble

    def ensemble(
        self, options: EnsembleOptions, logits: Tensor, weights: Tensor | None, trace: Tensor | None, differences: bool
    ) -> None:
        teachers, prior = self.batch.teacher_logits, self.batch.prior
        M = teachers.shape[-1]
        by_document = options.granularity == "document"
        self._state(M, max(6 * M, 16))
        self.table = self.some.new_empty((self.documents, M), dtype=torch.float32)
        tiles = dict(MP=self.config["MP"], **self.rows)
        weighted, packed = dict(WEIGHTED=self.weighted), dict(PACKED=self.packed)
        strided = (teachers, *(0,) * (3 - teachers.dim()), *teachers.stride())
        of_prior = (prior, 0, 0) if prior is None else (prior, *(0,) * (2 - prior.dim()), *prior.stride())
        inv_temperature, offset = 1 / options.temperature, options.margin / options.temperature
        partials = (self.partials, self.partials.shape[1])
        each, query = (self.count,), (self.queries,)
        of_query = (self.counts, self.batch.cu_seqlens, self.slots, self.documents, M)
        over_chunks = dict(TILE=16)

        def run(kernel, grid, *arguments, **constants):
            kernel[grid](*arguments, **constants, **packed, **self.launch_options)

        run(
            long_ensemble.statistics_kernel, each, *strided, *self.mask_arguments, *of_prior, self.order, *partials,
            *self.where, *self.sizes, M, MASKED=self.mask is not None, **tiles,
        )  # fmt: skip
        run(
            long_ensemble.query_statistics_kernel, query, *partials, *of_prior, self.per_query, *of_query,
            inv_temperature, offset, NORMALIZE=options.normalize, WINDOW=WINDOW, MP=self.config["MP"], **over_chunks,
        )  # fmt: skip
        run(
            long_ensemble.calibrate_kernel, each, *strided, *self.mask_arguments, self.order, self.fields, self.table,
            self.per_query, *partials, *self.where, *self.sizes, M, inv_temperature,
            MASKED=self.mask is not None, **weighted, **tiles,
        )  # fmt: skip
        direct = dict(DIRECT=not self.split)
        run(
            long_ensemble.counts_kernel, each, self.fields, self.per_query, *partials, *self.where_of_block, *self.sizes, M,
            TILE=TILE, **direct, **weighted, **self.pair_tile,
        )  # fmt: skip
        if trace is not None or not by_document:
            run(long_ensemble.totals_kernel, query, self.per_query, *partials, *of_query, TILE=TILE)
        if self.split:
            self._prepare_fields(offset, trace is not None)
        for iteration in range(options.iterations + 1):
            last = iteration == options.iterations
            if last and trace is None:
                break
            read = iteration % 2 if by_document else 0
            if self.split:
                self._label_fields(U.value + read, SCORED_RANK.value, GRID.value, offset, not last, trace is not None)
            if trace is not None:
                run(
                    long_ensemble.trace_kernel, each, self.fields, self.losses, self.per_query, *partials,
                    *self.where_of_block, read, *self.sizes, M, offset,
                    APPROX=self.approx, **direct, **weighted, **self.pair_tile,
                )  # fmt: skip
                run(
                    long_ensemble.trace_sum_kernel, query, trace, trace.shape[1], iteration, self.per_query, *partials,
                    *of_query, TILE=TILE,
                )  # fmt: skip
            if last:
                break
            run(
                long_ensemble.iterate_kernel, each, self.fields, self.table, self.pulls, self.per_query, *partials,
                *self.where_of_block, read, *self.sizes, M, inv_temperature, offset, float(options.step_size),
                BY_DOCUMENT=by_document, MARGIN=options.margin != 0, APPROX=self.approx, MP=self.config["MP"], **direct,
                **weighted, **self.pair_tile,
            )  # fmt: skip
            if not by_document:
                run(
                    long_ensemble.reweight_kernel, query, self.per_query, *partials, *of_query, float(options.step_size),
                    MP=self.config["MP"], **over_chunks,
                )  # fmt: skip
                run(
                    long_ensemble.tilt_kernel, each, self.fields, self.table, self.per_query, *self.where, *self.sizes, M,
                    inv_temperature, **tiles,
                )  # fmt: skip
        run(
            long_ensemble.output_kernel, each, self.fields, self.table, self.per_query, self.order, logits, weights,
            *self.where, *self.sizes, M, BY_DOCUMENT=by_document, DIFFERENCES=differences, **tiles,
        )  # fmt: skip
        if weights is not None and not by_document:
            long_ensemble.weights_kernel[query](weights, self.per_query, M, MP=self.config["MP"], **WARPS_1)

    # -- the student's loss

    def loss(
        self, options: LossOptions, target: Tensor | None, losses: Tensor, has_pairs: Tensor, gradient: Tensor | None
    ) -> None:
        student = self.batch.student_logits
        use_d, use_r = options.alpha > 0, options.alpha < 1
        mse = use_d and options.distillation.name == "mse"
        inv_tau = 1 / options.distillation.temperature if use_d and not mse else 1.0
        M = 1
        self._state(M, 16)
        terms, packed = dict(USE_D=use_d, USE_R=use_r), dict(PACKED=self.packed)
        partials = (self.partials, self.partials.shape[1])
        each, query = (self.count,), (self.queries,)
        of_query = (self.counts, self.batch.cu_seqlens, self.slots, self.documents, M)

        def run(kernel, grid, *arguments, **constants):
            kernel[grid](*arguments, **constants, **packed, **self.launch_options)

        run(
            long_loss.load_kernel, each, student, *(0,) * (2 - student.dim()), *student.stride(),
            *((target, *(0,) * (2 - target.dim()), *target.stride()) if use_d else (None, 0, 0)), *self.mask_arguments,
            self.order, self.fields, *partials, *self.where, *self.sizes,
            MASKED=self.mask is not None, WEIGHTED=self.weighted, **terms, **self.rows,
        )  # fmt: skip
        run(
            long_loss.loss_sums_kernel, query, self.per_query, *partials, *of_query, inv_tau,
            USE_D=use_d, WINDOW=WINDOW, TILE=TILE,
        )  # fmt: skip
        direct = dict(DIRECT=not self.split, APPROX=self.approx)
        if use_d:
            run(
                long_loss.scale_kernel, each, self.fields, self.per_query, *partials, *self.where, *self.sizes, M, inv_tau,
                **self.rows,
            )  # fmt: skip
            of_query_itself = self._self_fields() if self.split and not mse else (None, None)
            run(
                long_loss.distill_kernel, each, self.fields, *of_query_itself, self.per_query, *partials, self.chunk_begin,
                self.chunk_block, self.counts, self.owner, self.batch.cu_seqlens, *self.sizes, M, MSE=mse, TILE=TILE,
                **direct, **self.pair_tile,
            )  # fmt: skip
        if use_r:
            if self.split:
                self._prepare_fields(0.0, True)
                self._label_fields(Z.value, chunks.RANK.value, long_loss.LABEL_GRID.value, 0.0, True, True)
            run(
                long_loss.labels_kernel, each, self.fields, self.pulls, self.losses, self.per_query, *partials,
                *self.where_of_block, *self.sizes, M, WEIGHTED=self.weighted, TILE=TILE, **direct, **self.pair_tile,
            )  # fmt: skip
        run(
            long_loss.loss_total_kernel, query, losses, has_pairs, self.per_query, *partials, *of_query, options.alpha,
            inv_tau, TILE=TILE, **terms,
        )  # fmt: skip
        if gradient is not None:
            run(
                long_loss.gradient_kernel, each, gradient, self.fields, self.per_query, *self.mask_arguments, self.order,
                *self.where, *self.sizes, M, MASKED=self.mask is not None, **terms, **self.rows,
            )  # fmt: skip

    # -- fields

    def _state(self, teachers: int, width: int) -> None:
        self.stride = 5 * teachers + SCALARS.value
        self.scalars_at = 5 * teachers
        self.per_query = self._floats(self.queries, self.stride)
        self.partials = self._floats(self.count, width)
        self.pulls = self.losses = None

    def _floats(self, *shape: int) -> Tensor:
        return self.some.new_empty(shape, dtype=torch.float32)

    def _prepare_fields(self, offset: float, losses: bool) -> None:
        """Room for the label fields, and the matrices for an offset."""
        row, sets = fields.ROW.value, 2 if self.weighted else 1
        self._room(sets, 2)
        self.pulls = self._floats(self.blocks, sets, row)
        self.losses = self._floats(self.blocks, sets, row) if losses else None
        self.matrices = self._matrices(offset)

    def _room(self, sets: int, sides: int) -> None:
        row = fields.ROW.value
        self.moments = self._floats(self.moment_rows, sets, row)
        # By chunk, so that some of them are not used.
        self.supers = self._floats(-(-self.count // fields.SUPER.value), sets, row) if self.two_levels else self.moments
        self.sides = self._floats(self.blocks, sides, sets, row)

    def _matrices(self, offset: float) -> Tensor:
        tables = self._floats(3, fields.MATRICES.value)
        fields.matrices_kernel[(fields.ENTRIES.value, 3)](tables, offset, **WARPS_1)
        return tables

    def _label_fields(self, value: int, part: int, grid: int, offset: float, pulls: bool, losses: bool) -> None:
        """Fields of the label pairs at logits fields[value], of the documents whose fields[part] is not NaN."""
        sets = 2 if self.weighted else 1
        grid += self.scalars_at
        common = (self.per_query, self.stride)
        constants = dict(SETS=sets, PACKED=self.packed)
        fields.deposit_kernel[(self.count,)](
            self.moments, self.short, self.fields, *common, *self.where, *self.sizes, value, part, grid,
            GAIN=chunks.GAIN.value if self.weighted else -1, VALUES=1, PACKED=self.packed, CHUNK=self.chunk, **WARPS_2,
        )  # fmt: skip
        self._sum(sets, grid, False, 2 * sets, self.blocks)
        fields.apply_labels_kernel[(self.blocks, sets)](
            self.pulls if pulls else None, self.losses if losses else None, self.sides, self.matrices, *common,
            self.chunk_begin, self.block_chunk, self.counts, self.owner, self.batch.cu_seqlens, *self.sizes, grid, offset,
            TARGETS=16, **WARPS_4, **constants,
        )  # fmt: skip

    def _self_fields(self) -> tuple[Tensor, Tensor]:
        """Fields of a query's documents with a target on each other: slopes of student and target, and the student's loss."""
        row, grid = fields.ROW.value, self.scalars_at + long_loss.Z_GRID.value
        self._room(2, 1)
        pulls, losses = self._floats(self.blocks, 2, row), self._floats(self.blocks, row)
        fields.deposit_kernel[(self.count,)](
            self.moments, self.short, self.fields, self.per_query, self.stride, *self.where, *self.sizes, Z_SCALED.value,
            S_SCALED.value, grid, GAIN=-1, VALUES=2, PACKED=self.packed, CHUNK=self.chunk, **WARPS_2,
        )  # fmt: skip
        self._sum(2, grid, True, 2, self.queries)
        fields.apply_self_kernel[(self.queries, 2)](
            pulls, losses, self.sides, self._matrices(0.0), self.per_query, self.stride, self.chunk_block, self.counts,
            self.batch.cu_seqlens,
            self.slots, self.documents, grid, PACKED=self.packed, TARGETS=16, **WARPS_4,
        )  # fmt: skip
        return pulls, losses

    def _sum(self, sets: int, grid: int, of_self: bool, sides: int, targets: int) -> None:
        constants = dict(SELF=of_self, SETS=sets, PACKED=self.packed, COLUMNS=128, **WARPS_4)
        common = (self.per_query, self.stride)
        if self.two_levels:
            fields.super_kernel[(self.supers.shape[0], sets)](
                self.moments, self.short, self.supers, *common, self.chunk_begin, self.counts, self.owner,
                self.batch.cu_seqlens, *self.sizes, grid, **constants,
            )  # fmt: skip
        fields.collect_kernel[(targets, sides)](
            self.sides, self.moments, self.short, self.supers, *common, *self.where_of_block, *self.sizes, grid,
            TWO_LEVELS=self.two_levels, **constants,
        )  # fmt: skip
