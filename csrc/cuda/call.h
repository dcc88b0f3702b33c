// What every launch gets. Host code too.
//
// The words of csrc/cuda, each with one meaning:
//   lanes        a few neighbouring threads of a warp that share one row
//   team         the threads that own a query: a warp or a (thread) block
//   block        a thread block, as CUDA says; blocks of labels are label blocks, always in two words
//   label block  a run of neighbouring label groups whose documents meet those of other label blocks through fields
//   position     a document's place in the order of falling labels; slot: its place in the caller's tensors
//   piece        1,024 positions of a long list, which one block works on
//   overlap      what a piece and a label block share
//   tile         the columns of pair sums that lie in shared memory at a time
//   short, long  a list that one team takes in a single launch; one that many blocks take, a launch per phase
//   narrow, wide logits whose range lets the products of e^u stay float32s, or not (pairs.h)
#pragma once

#if defined(PILE_EMULATION)
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include "pile/half.h"
#include "pile/options.h"

namespace pile::gpu {

template <class T>
PILE_SHARED T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
PILE_SHARED T larger(T a, T b) {
  return a > b ? a : b;
}

// How a label becomes the gain by which pairs, as differences, or lists are weighed: as the pair weights of these names; or of a
// label term that takes labels as gains, by 2^y − 1, by y, or 1 for labels above 0.
enum class LabelGain : int32_t { none, label_gap, gain_gap, exp2, linear, any };
PILE_SHARED LabelGain gain_of(PairWeight weight) { return LabelGain(int32_t(weight)); }
PILE_SHARED bool takes_gains(LabelGain gain) { return gain >= LabelGain::exp2; }

// By value to every kernel: pointers to the caller's tensors, sizes and options.
struct Call {
  Batch batch;
  bool has_ensemble = false, has_loss = false;
  EnsembleOptions ensemble = {};
  LossOptions loss = {};
  // Divided on the host, once: on a device divisions of doubles are long.
  float step = 0, per_unit = 1, offset = 0;  // step_size; u = s · per_unit; margin / temperature
  float distill_unit = 1;                    // the distillation sees logits times this
  LabelGain label_gain = LabelGain::none;    // of the label term
  Outputs out = {};
  void* scaled = nullptr;        // the mean's gradient, in the student's dtype; out.gradient is then in float32
  float* losses = nullptr;       // by query
  int32_t* has_pairs = nullptr;  // by query
  void* scratch = nullptr;       // short: for queries that do not fit shared memory; long: see LongState
  int capacity = 0;              // documents that fit shared memory
  int rows = 1;                  // of the ensemble's pairs that four lanes take at once, 1 or 4

  PILE_SHARED bool distills() const { return has_loss && loss.alpha > 0; }
  PILE_SHARED bool ranks() const { return has_loss && loss.alpha < 1; }
  // Does the ensemble look at label pairs? At weights that are given it does so for its trace or the queries' pulls alone.
  PILE_SHARED bool by_pairs() const { return has_ensemble && (ensemble.iterations > 0 || out.trace || out.pulls); }
  PILE_SHARED bool by_document() const { return ensemble.granularity == Granularity::document; }
  PILE_SHARED int teachers() const { return has_ensemble ? int(batch.teachers) : 0; }
  PILE_SHARED int64_t documents() const { return batch.packed() ? batch.slots : batch.queries * batch.slots; }
};

}  // namespace pile::gpu
