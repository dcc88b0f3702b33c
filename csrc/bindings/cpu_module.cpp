// pile_fast._cpu: the CPU backend as a Python module. Tensors come as addresses and strides, so that one build serves every
// version of PyTorch; pile_fast/backends/cpp.py is the only caller and answers for them.
#include <pybind11/pybind11.h>

#include "../cpu/job.h"

namespace py = pybind11;

namespace {

int64_t integer(PyObject* tuple, Py_ssize_t index) {
  const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, index));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// (address, dtype, stride per query, per document, per teacher), or None.
pile::View view(PyObject* item) {
  pile::View v;
  if (item == Py_None) return v;
  v.data = reinterpret_cast<const void*>(static_cast<uintptr_t>(integer(item, 0)));
  v.dtype = static_cast<pile::DType>(integer(item, 1));
  v.query = integer(item, 2);
  v.document = integer(item, 3);
  v.teacher = integer(item, 4);
  return v;
}

void* address(PyObject* tuple, Py_ssize_t index) { return reinterpret_cast<void*>(static_cast<uintptr_t>(integer(tuple, index))); }

// False: cu_seqlens does not start at 0, decreases, or runs past the documents.
bool offsets_fit(const pile::Batch& batch) {
  if (!batch.packed()) return true;
  if (batch.first(0) != 0) return false;
  for (int64_t q = 0; q < batch.queries; ++q)
    if (batch.length(q) < 0) return false;
  const int64_t end = batch.queries ? batch.begin(batch.queries - 1) + batch.length(batch.queries - 1) : 0;
  return end <= batch.slots;
}

bool run(py::tuple sizes, py::tuple views, const pile::EnsembleOptions* ensemble, const pile::LossOptions* loss, py::tuple outputs,
         bool wide, int threads) {
  pile::Job job;
  PyObject* s = sizes.ptr();
  PyObject* v = views.ptr();
  PyObject* o = outputs.ptr();
  if (PyTuple_GET_SIZE(s) != 3 || PyTuple_GET_SIZE(v) != 7 || PyTuple_GET_SIZE(o) != 5) throw py::type_error("_cpu.run: malformed call");
  job.batch.queries = integer(s, 0);
  job.batch.slots = integer(s, 1);
  job.batch.teachers = integer(s, 2);
  pile::View* fields[] = {&job.batch.student, &job.batch.teacher, &job.batch.target, &job.batch.labels,
                          &job.batch.mask,    &job.batch.cu_seqlens, &job.batch.prior};
  for (int i = 0; i < 7; ++i) *fields[i] = view(PyTuple_GET_ITEM(v, i));
  job.out.logits = address(o, 0);
  job.out.weights = address(o, 1);
  job.out.trace = address(o, 2);
  job.out.loss = address(o, 3);
  job.out.gradient = address(o, 4);
  job.ensemble = ensemble;
  job.loss = loss;
  job.wide = wide;
  job.threads = threads;
  if (!offsets_fit(job.batch)) return false;
  py::gil_scoped_release release;
  pile::run(job);
  return true;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of pile_fast.";
  py::class_<pile::EnsembleOptions>(m, "EnsembleOptions")
      .def(py::init([](int64_t iterations, double step_size, int granularity, int normalize, double temperature, double margin,
                       int pair_weight, int pairwise) {
        return pile::EnsembleOptions{iterations, step_size, static_cast<pile::Granularity>(granularity),
                                     static_cast<pile::Normalize>(normalize), temperature, margin,
                                     static_cast<pile::PairWeight>(pair_weight), static_cast<pile::PairSum>(pairwise)};
      }));
  py::class_<pile::LossOptions>(m, "LossOptions")
      .def(py::init([](double alpha, int distillation, double temperature, int pair_weight, int reduction, int pairwise) {
        return pile::LossOptions{alpha, static_cast<pile::Distillation>(distillation), temperature,
                                 static_cast<pile::PairWeight>(pair_weight), static_cast<pile::Reduction>(reduction),
                                 static_cast<pile::PairSum>(pairwise)};
      }));
  m.def("run", &run, "Run one call; False if cu_seqlens does not fit.");
  m.def("instruction_set", &pile::instruction_set, "The instruction set in use.");
  m.def("instruction_sets", &pile::instruction_sets, "Those this processor and this build have, best first.");
  m.def("set_instruction_set", &pile::set_instruction_set, "Use another one; False if it is not there.");
}
