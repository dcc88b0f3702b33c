// pile_fast._cpu: the CPU backend as a Python module. Tensors come as addresses and strides, so that one build serves every
// version of PyTorch; pile_fast/backends/cpp.py is the only caller and answers for them.
#include "../cpu/job.h"
#include "../cpu/team.h"
#include "arguments.h"

namespace py = pybind11;

namespace {

// What a call ends with, if not with the first query whose labels cannot be compared.
enum : int64_t { kDone = -1, kOffsets = -2 };

// On the calling thread: a pending Ctrl-C, or another signal whose Python handler raises, ends the call.
void check_signals() {
  py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// False: cu_seqlens does not start at 0, decreases, or runs past the documents; or a query is too long to count in 31 bits.
bool offsets_fit(const pile::Batch& batch) {
  constexpr int64_t kLongest = 2147483647;
  if (!batch.packed()) return batch.slots <= kLongest;
  if (batch.first(0) != 0) return false;
  for (int64_t q = 0; q < batch.queries; ++q)
    if (batch.length(q) < 0 || batch.length(q) > kLongest) return false;
  const int64_t end = batch.queries ? batch.begin(batch.queries - 1) + batch.length(batch.queries - 1) : 0;
  return end <= batch.slots;
}

int64_t run(py::tuple sizes, py::tuple views, const pile::EnsembleOptions* ensemble, const pile::LossOptions* loss,
            py::tuple outputs, uintptr_t exponents, uintptr_t hessian, bool float64, int threads) {
  pile::Job job;
  job.batch = pile::bindings::read_batch(sizes.ptr(), views.ptr());
  job.out = pile::bindings::read_outputs(outputs.ptr());
  job.exponents = reinterpret_cast<double*>(exponents);
  job.hessian = reinterpret_cast<void*>(hessian);
  job.ensemble = ensemble;
  job.loss = loss;
  job.float64 = float64;
  job.threads = threads;
  job.interrupt = check_signals;
  pile::bindings::check_inputs(job.batch, ensemble, loss);
  if (!offsets_fit(job.batch)) return kOffsets;
  {
    py::gil_scoped_release release;
    pile::run(job);
  }
  return job.wrong_labels < 0 ? int64_t{kDone} : job.wrong_labels.load();
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of pile_fast.";
  pile::bindings::bind_options(m, [](auto term) { return pile::baseline::has_term(term.kKey, false); });
  m.attr("CURVED") = pile::bindings::keys([](auto term) { return pile::baseline::has_term(term.kKey, true); });
  m.attr("DONE") = py::int_(int64_t{kDone});
  m.def("run", &run,
        "Run one call. DONE; less if cu_seqlens does not fit or a query is too long; or the first query with wrong labels.");
  m.def("has_threads", &pile::has_threads, "Whether calls find threads beside their own: those of PyTorch's OpenMP runtime.");
  m.def("instruction_set", &pile::instruction_set, "The instruction set in use.");
  m.def("instruction_sets", &pile::instruction_sets, "Those this processor and this build have, best first.");
  m.def("set_instruction_set", &pile::set_instruction_set, "Use another one; False if it is not there.");
}
