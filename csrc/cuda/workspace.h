// Where a query lies in the caller's tensors, and where its state.
#pragma once

#include "device.h"

namespace pile::gpu {

// One query: n slots, the first of them `output` among all outputs' and `input` within its row of the inputs.
struct Query {
  int64_t index, output, input;
  int n;
};

PILE_DEVICE Query locate(const Call& call, int64_t q) {
  const Batch& batch = call.batch;
  if (!batch.cu_seqlens.data) return {q, q * batch.slots, 0, int(batch.slots)};
  // Reading cu_seqlens on the host would stall the stream, so here nothing it says leads out of the tensors.
  auto offset = [&](int64_t k) {
    const int64_t at = k * batch.cu_seqlens.document;
    const int64_t start = batch.cu_seqlens.dtype == DType::i64 ? static_cast<const int64_t*>(batch.cu_seqlens.data)[at]
                                                               : static_cast<const int32_t*>(batch.cu_seqlens.data)[at];
    return smaller(larger(start, int64_t(0)), batch.slots);
  };
  const int64_t first = offset(q), last = larger(offset(q + 1), first);
  return {q, first, first, int(last - first)};
}

// A query's state: a few numbers per document, its calibrated teachers, a few numbers per teacher. In shared memory where a
// query fits, else in the scratch buffer. "By position" is the order of falling labels, "by slot" the caller's.
struct Workspace {
  // Fields of 4 bytes per document. Some share memory: they are used at different times.
  enum Field {
    kU0 = 0,
    kU1,    // by position: e^{c − u} (u where wide), u = s / temperature; iterations read one, write the other
    kSlot,  // by position
    kFirst,
    kLast,      // by position: where its label begins and ends
    kGain,      // by position, in [0, 1]
    kPerPair,   // by position: 1 / k_i, 0 without pairs
    kAbove,     // by position: Σ ω over the documents above
    kExponent,  // by position: a_i; of weights that documents share: λ_i / share_i
    kLow,
    kHigh,     // by position: lowest and highest teacher
    kLogit,    // by position while iterating, then by slot: s
    kStudent,  // by slot
    kFields,
    kKeys = kU0,     // 8 bytes: by slot, then by position
    kPrefix = kLow,  // 8 bytes: running sum of the gains
    // The loss's own, by position; a tile is what its term makes of the columns, filled up to whole fours.
    kPlainStudent = kExponent,
    kWeight = kStudent,
    kSlope = kAbove,
    kLoss = kPerPair,
    kTileStudent = kLow,
    kTileTarget = kHigh,
    kTileStudentMore = kU0,
    kTileTargetMore = kU1,
  };
  static constexpr int kPerTeacher = 8;     // 4 bytes each: mean (8), scale (8), energy, weight; whole 16 bytes
  static constexpr int kPerQuery = 2 * 32;  // a double for each warp of the team

  float* documents = nullptr;
  float* teachers = nullptr;  // [M][stride], calibrated, NaN = missing
  float* of_teachers = nullptr;
  double* partial = nullptr;
  int stride = 0;  // documents from field to field and teacher to teacher; an int, for the registers

  static PILE_SHARED int64_t words(int64_t documents, int teachers) {
    return documents * (kFields + teachers) + int64_t(kPerTeacher) * teachers + kPerQuery;
  }
  PILE_DEVICE Workspace(float* base, int capacity, int teacher_count)
      : documents(base),
        teachers(base + int64_t(capacity) * kFields),
        of_teachers(base + int64_t(capacity) * (kFields + teacher_count)),
        partial(reinterpret_cast<double*>(of_teachers + kPerTeacher * teacher_count)),
        stride(capacity) {}

  PILE_DEVICE float* field(Field f) const { return documents + f * stride; }
  PILE_DEVICE int* whole(Field f) const { return reinterpret_cast<int*>(field(f)); }
  PILE_DEVICE int64_t* keys() const { return reinterpret_cast<int64_t*>(field(kKeys)); }
  PILE_DEVICE double* prefix() const { return reinterpret_cast<double*>(field(kPrefix)); }
  PILE_DEVICE double* mean() const { return reinterpret_cast<double*>(of_teachers); }
  PILE_DEVICE double* scale(int teacher_count) const { return mean() + teacher_count; }
  PILE_DEVICE float* energy(int teacher_count) const { return of_teachers + 4 * teacher_count; }  // and weights
};

}  // namespace pile::gpu
