// What every launch gets. Host code too.
#pragma once

#include "runtime.h"

namespace pile {
namespace gpu {

// By value to every kernel: pointers to the caller's tensors, sizes and options.
struct Call {
  Batch batch;
  bool has_ensemble = false, has_loss = false;
  EnsembleOptions ensemble = {};
  LossOptions loss = {};
  float step = 0, per_unit = 1, offset = 0;  // step_size; u = s · per_unit; margin / temperature
  float per_tau = 1;                         // of the logits the distillation sees
  bool mse = false;                          // the distillation's term
  Outputs out = {};  // `gradient` is of dtype `gradient_dtype`: float32 where the reduction still has to scale it
  DType gradient_dtype = DType::f32;
  float* losses = nullptr;       // by query
  int32_t* has_pairs = nullptr;  // by query
  float* scratch = nullptr;      // for queries that do not fit shared memory
  int capacity = 0;              // documents that fit shared memory
  int rows = 1;                  // of the ensemble's pairs that four lanes take at once, 1 or 4

  PILE_SHARED bool distills() const { return has_loss && loss.alpha > 0; }
  PILE_SHARED bool ranks() const { return has_loss && loss.alpha < 1; }
  PILE_SHARED bool by_document() const { return ensemble.granularity == Granularity::document; }
  PILE_SHARED int teachers() const { return has_ensemble ? int(batch.teachers) : 0; }
  PILE_SHARED int64_t documents() const { return batch.cu_seqlens.data ? batch.slots : batch.queries * batch.slots; }

  // Divisions are done here, once: on a device those of doubles are long.
  void set_options(const EnsembleOptions* of_ensemble, const LossOptions* of_loss) {
    has_ensemble = of_ensemble != nullptr;
    has_loss = of_loss != nullptr;
    if (of_ensemble) {
      ensemble = *of_ensemble;
      step = float(ensemble.step_size);
      per_unit = float(1 / ensemble.temperature);
      offset = float(ensemble.margin / ensemble.temperature);
    }
    if (of_loss) {
      loss = *of_loss;
      per_tau = 1;
      loss.distillation.visit([&](auto term) {
        if constexpr (std::is_same_v<decltype(term), DistillLogistic>) per_tau = float(1 / term.temperature);
        mse = std::is_same_v<decltype(term), DistillMse>;
      });
    }
  }
};

}  // namespace gpu
}  // namespace pile
